"""explain on a cell of the user's own: what its recurrence is like and what would run it."""

import pytest

from statewise.cli import main

CELL = '''
import torch
from statewise import Cell

class Sine(Cell):
    """h_t = sin(w h_{t-1} + x_t)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = self.out_width = width
        self.w = torch.nn.Parameter(torch.rand(width))

    def initial_state(self, batch):
        return self.w.new_zeros(batch, self.width)

    def transition(self, u, h):
        h = torch.sin(self.w * h + u)
        return h, h
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "sine_cell.py").write_text(CELL)
    monkeypatch.chdir(tmp_path)


def test_a_cell_is_explained(here, capsys):
    assert main(["explain", "sine_cell:Sine", "--args", "width=2", "--shape", "2,300,2"]) == 0
    told = capsys.readouterr().out
    assert "h_t = sin(w h_{t-1} + x_t)" in told and "diagonal (2 numbers)" in told
    assert told.count("<- this one") == 1 and "(2, 300, 2)" in told and "differs from the loop by" in told


def test_what_is_no_cell_is_refused(here, capsys):
    assert main(["explain", "sine_cell:Cosine"]) == 2
    assert "Cosine" in capsys.readouterr().err
