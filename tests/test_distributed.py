"""DDP and FSDP2 on two processes (gloo, CPU): the gradients are those of one process on the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from aape_kernels import AaPE, replace_stem

PROCESSES = 2


class TinyViT(nn.Module):
    """A stem, a transformer layer, a head; the stem's convolution is replaced, or AaPE's from the start."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        options = {"num_states": 4, "encoder_dim": 8}
        self.stem = nn.Conv2d(1, 16, 16, 16) if replaced else AaPE(embed_dim=16, flatten=False, **options)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)
        if replaced:
            replace_stem(self, path="stem", layout="FT", **options)
            nn.init.normal_(self.stem.fusion.weight, std=0.1)

    def forward(self, x):
        return self.head(self.block(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    results = {}
    for replaced in (False, True):
        model, x = torch.load(Path(folder) / f"{replaced}.pt", weights_only=False)
        mine = x.chunk(PROCESSES)[rank]
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        loss(wrapped, mine).backward()
        results["ddp", replaced] = [parameter.grad for parameter in wrapped.parameters()]

        sharded = copy.deepcopy(model)
        fully_shard(sharded.stem, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        loss(sharded, mine).backward()
        results["fsdp2", replaced] = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
        torch.optim.SGD(sharded.parameters(), lr=0.1).step()
    if rank == 0:
        torch.save(results, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_gradients_are_those_of_the_whole_batch(tmp_path):
    want = {}
    for replaced in (False, True):
        model, x = TinyViT(replaced), torch.randn(4, 1, 32, 64)
        torch.save((model, x), tmp_path / f"{replaced}.pt")
        loss(model, x).backward()
        want[replaced] = {name: parameter.grad for name, parameter in model.named_parameters()}
    mp.start_processes(train, (str(tmp_path / "store"), str(tmp_path)), PROCESSES, start_method="spawn")
    results = torch.load(tmp_path / "gradients.pt")
    assert set(results) == {(how, replaced) for how in ("ddp", "fsdp2") for replaced in (False, True)}
    for (how, replaced), gradients in results.items():
        for (name, expected), got in zip(want[replaced].items(), gradients, strict=True):
            assert relative_error(got, expected) <= 1e-5, (how, name)
