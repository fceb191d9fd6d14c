"""Parameters, gradients, the optimiser's state and the teacher sharded over processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from .._lightning import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, Strategy, StrategyRegistry
from ..method.objective import Pretraining

__all__ = ["ShardedStrategy", "check_strategy", "gathered", "shard", "total_norm"]


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy`, sharding over all processes: `--trainer.strategy=sharded`.

    Each process holds a part of every parameter of student, teacher and predictor, of its gradient and of the
    optimiser's state, and a layer's whole parameters only while it runs. Its checkpoints are those of a single process:
    one file through the trainer's `CheckpointIO`, from which either can go on, with any number of processes.

    Takes Lightning's other arguments, such as `process_group_backend` and `timeout`.

    Source: ours. Lightning's saves a folder of shards unless told otherwise, and numbers the optimiser's parameters
    by the model, where a single process numbers them by the optimiser.
    """

    def __init__(self, **options: Any) -> None:
        # one process, until `setup_environment` knows
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """As Lightning's, over all processes of all nodes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Through `load_optimizer_state_dict`, like a single process."""
        return True

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The whole state on the CPU of the first process, as `optimizer.state_dict()` of a single one has it."""

        def kept(tensor: Tensor) -> Tensor:
            return whole(tensor).cpu() if self.is_global_zero else whole(tensor).new_empty(0)

        # bypass `ModelParallelStrategy`: its base class only asks the optimiser
        state: dict[str, Any] = ParallelStrategy.optimizer_state(self, optimizer)
        return tree_map_only(Tensor, kept, state)  # type: ignore[no-any-return]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Through the trainer's `CheckpointIO`."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """This process's part of whole weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This process's part of a whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {name: _part(value, parameter) for name, value in state["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in state["state"]
            }
            optimizer.load_state_dict({**state, "state": parts})


StrategyRegistry.register("sharded", ShardedStrategy, "FSDP2 over all processes, with whole checkpoints")


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that shard in another way.

    FSDP1 leaves flat pieces of parameters: none would have weight decay, which depends on the number of axes, and the
    teacher's pieces are not the student's. Lightning's own `ModelParallelStrategy` would resume a single process's run
    with one parameter's moments in place of another's.

    Errors: `ValueError`.
    """
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise ValueError(
            "strategy: expected 'sharded' (ShardedStrategy, a ModelParallelStrategy with FSDP2) for "
            f"sharded parameters, got {type(strategy).__name__}"
        )


def shard(objective: Pretraining, mesh: DeviceMesh, device: torch.device, compile: bool = False) -> None:  # noqa: A002
    """Shard the objective in place over a mesh of one axis, starting from the first process's weights.

    Student and teacher are sharded alike, so that the teacher's average is one of parts. Layers are gathered one by
    one; the rest (stems, norms, heads) is small and whole from the objective's forward to the end of its backward.

    compile: whether to run each layer through `torch.compile`.
    """
    if isinstance(objective, FSDPModule):
        return  # already sharded, in another fit of the same module
    objective.to(device)
    for tensor in (*objective.parameters(), *objective.buffers()):
        dist.broadcast(tensor.detach(), 0)
    for part in (objective.student, objective.teacher, objective.predictor):
        for layer in part.layers:
            if compile:  # `forward`, as no graph may hold the hooks around it, which gather the layer
                layer.forward = torch.compile(layer.forward)
            fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    for module in objective.modules():
        # gloo's average is a sum in some releases of torch (its issue 162338)
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A context in which a sharded module, but not the sharded ones in it, has whole parameters; others are unchanged.

    For looking at them, on all processes, between steps.
    """
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which this process may hold a part; to be called on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm of the parameters' gradients, over all processes that hold parts of them."""
    return whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def _part(value: Any, parameter: Tensor) -> Any:
    """The part of an optimiser's whole `value` that belongs to this process's part of `parameter`."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    # every process has the whole value, so none needs to send it
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
