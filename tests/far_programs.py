"""Programs of an interpreted kernel far from the first, over memory of which only what is written takes room."""

import torch


class FarPrograms:
    """After `start(p)` the interpreter's program 0 is program p."""

    def __init__(self, monkeypatch, folder):
        from triton.runtime.interpreter import interpreter_builder as builder

        self.folder, self.files, self.first = folder, 0, 0
        place = builder.set_grid_idx

        def shifted(x, y, z):
            builder.set_grid_dim(self.first + x + 1, 1, 1)
            place(self.first + x, y, z)

        monkeypatch.setattr(builder, "set_grid_idx", shifted)

    def start(self, program):
        self.first = program

    def memory(self, size, dtype):
        """Zeros, in a sparse file."""
        self.files += 1
        return torch.from_file(str(self.folder / str(self.files)), shared=True, size=size, dtype=dtype)
