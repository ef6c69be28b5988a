from ..training import choose_device as find_device

__all__ = ["find_device"]
