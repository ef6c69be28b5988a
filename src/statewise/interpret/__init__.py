"""Understanding what a layer does: the linear system that it is on given inputs."""

from .dynamics import Dynamics, dynamics

__all__ = ["Dynamics", "dynamics"]
