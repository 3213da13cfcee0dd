"""A user's own script, which knows nothing of fleetune: run by `accelerate launch` in test_accelerate. Argument: OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


def main(out: Path) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    inputs = torch.randn(256, 6)
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for rows, targets in loader:
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(rows), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    if accelerator.is_main_process:
        seen = {"kind": accelerator.distributed_type.value, "ranks": accelerator.num_processes, "losses": losses}
        out.write_text(json.dumps(seen | {"engine": type(model).__name__}))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
