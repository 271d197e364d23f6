"""The optimizer of a run: which rule each parameter follows, and all that it keeps, by name.

Every tensor that a parameter's update needs is `parameter name/state name`: `step`, `exp_avg` and `exp_avg_sq` of
AdamW, `momentum` of Muon. What the updates are added to, `weights`, is what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from openelm.errors import CheckpointError, ConfigError
from openelm.model.parts import fill, own_part
from openelm.model.transformer import OpenELM
from openelm.optim.adamw import STATE, update_adamw
from openelm.optim.config import OptimizerConfig
from openelm.optim.muon import update_muon
from openelm.optim.rounding import rounding_generator, stochastically_rounded


class Optimizer:
    """Updates a model's parameters from their gradients; those that do not learn are left to themselves.

    Makes the matrices of the layers bf16 where the config says so.

    Args:
        seed: of stochastic rounding.

    Raises:
        ConfigError: this PyTorch cannot add up fp32 gradients of bf16 parameters.
    """

    def __init__(self, config: OptimizerConfig, model: OpenELM, *, seed: int = 0) -> None:
        if config.weights != "fp32" and not hasattr(Tensor, "grad_dtype"):
            what = f"optimizer.weights {config.weights!r} needs a newer PyTorch than {torch.__version__}"
            raise ConfigError(what, fix="install torch 2.13, or set optimizer.weights=fp32")
        self._config, self._model, self._seed = config, model, seed
        self._learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
        matrices = {name: count for name, count in model.layer_matrices().items() if name in self._learning}
        self._muon = matrices if config.kind == "muon" else {}
        self._masters: dict[str, Tensor] = {}
        self._rounded = frozenset(matrices) if config.weights == "bf16-stochastic" else frozenset[str]()
        if config.weights != "fp32":
            for name in matrices:
                if config.weights == "bf16":
                    self._masters[name] = self._learning[name].data
                self._learning[name].data = self._learning[name].data.to(torch.bfloat16)
        self._state = {f"{name}/{key}": value for name in self._learning for key, value in self._zeros(name).items()}

    def _zeros(self, name: str) -> dict[str, Tensor]:
        parameter = self._learning[name]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if name in self._muon:
            return {"momentum": torch.zeros_like(parameter, dtype=wide, requires_grad=False)}
        moments = {key: torch.zeros_like(parameter, dtype=wide, requires_grad=False) for key in STATE[1:]}
        return {STATE[0]: torch.zeros((), device=parameter.device), **moments}

    @property
    def skips_on_device(self) -> bool:
        """Whether `step` can leave it to the device whether it updates anything: fused AdamW can."""
        return not self._muon

    def weights(self) -> dict[str, Tensor]:
        """Return what the updates are added to, by name: the parameters that learn, or the fp32 ones beside them."""
        learning = {name: value for name, value in self._model.state_dict().items() if name in self._learning}
        return {**learning, **self._masters}

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take whole weights by name; of a shared model each process takes its rows."""
        own = self.weights()
        for name, whole in weights:
            fill(own[name], whole)
            if name in self._masters:
                self._learning[name].copy_(own[name])

    @contextlib.contextmanager
    def wide_weights(self) -> Iterator[None]:
        """Give the model fp32 matrices for a while: those beside its bf16 ones, or copies of these."""
        weights = self.weights()
        narrow = {name: self._learning[name].data for name in (*self._masters, *self._rounded)}
        try:
            for name in narrow:
                self._learning[name].data = weights[name].float()
            yield
        finally:
            for name, data in narrow.items():
                self._learning[name].data = data

    def state(self) -> dict[str, Tensor]:
        """Return all that is kept from step to step besides the weights, by name."""
        return dict(self._state)

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; of a shared model each process takes its rows.

        Raises:
            CheckpointError: a tensor is of no parameter of the model, of another shape, or missing.
        """
        for path in sorted(state.keys() - self._state.keys()):
            raise CheckpointError(f"the optimizer's tensor {path!r} does not fit this model and optimizer")
        if missing := sorted(self._state.keys() - state.keys()):
            raise CheckpointError(f"the optimizer's tensor {missing[0]!r} is missing, and {len(missing) - 1} more")
        for path, own in self._state.items():
            whole = state[path]
            if whole.shape != own.shape:
                raise CheckpointError(f"the optimizer's tensor {path!r} does not fit this model and optimizer")
            fill(own, whole)

    @torch.no_grad()
    def step(self, rate: float, *, step: int = 0, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """Update all parameters that have a gradient.

        Args:
            step: the number of this update, which decides how numbers are rounded at random.
            divisor: by what gradients are divided first, a scalar on their device (see `clip_divisor`); what is in
                their place afterwards is undefined.
            skip: a scalar on their device, 1 to update nothing; where `skips_on_device` only.
        """
        assert skip is None or self.skips_on_device
        if divisor is not None and divisor.device.type == "cpu" and divisor == 1:
            divisor = None  # a GPU's is not waited for
        for names in self._groups():
            wide = {name: self._wide(name) for name in names}
            decay = self._config.weight_decay if self._learning[names[0]].ndim >= 2 else 0.0
            gradients = [own_part(self._gradient(name)) for name in names]
            if names[0] in self._muon:
                (name,), (gradient,), parameter = names, gradients, self._learning[names[0]]
                momentum = own_part(self._state[f"{name}/momentum"])
                update_muon(
                    wide[name], gradient, momentum, self._muon[name], parameter,
                    rate=rate, weight_decay=decay, divisor=divisor,
                )  # fmt: skip
            else:
                states = [[own_part(self._state[f"{name}/{key}"]) for key in STATE] for name in names]
                update_adamw(
                    list(wide.values()), gradients, states, self._config,
                    rate=rate, weight_decay=decay, divisor=divisor, skip=skip,
                )  # fmt: skip
            for name, value in wide.items():
                self._settle(name, value, step)

    def _groups(self) -> Iterator[list[str]]:
        """Yield the names that are updated together: alone what needs a wide copy for a moment."""
        names = [name for name, parameter in self._learning.items() if parameter.grad is not None]
        alone = self._muon.keys() | self._rounded
        for dims in (2, 1):
            if together := [name for name in names if self._learning[name].ndim == dims and name not in alone]:
                yield together
        yield from ([name] for name in names if name in alone)

    def _gradient(self, name: str) -> Tensor:
        gradient = self._learning[name].grad
        assert gradient is not None
        return gradient

    def _wide(self, name: str) -> Tensor:
        """Return the weight to which an update can be added."""
        if name in self._masters:
            return self._masters[name]
        own = own_part(self._learning[name].detach())
        return own.float() if name in self._rounded else own

    def _settle(self, name: str, wide: Tensor, step: int) -> None:
        """Give the model an updated weight."""
        if name in self._masters:
            self._learning[name].copy_(wide)
        elif name in self._rounded:
            generator = rounding_generator(self._seed, step, name, wide.device)
            self._learning[name].copy_(stochastically_rounded(wide, generator))


def clip_divisor(norm: Tensor, largest: float) -> Tensor:
    """Return by what gradients of a norm are divided so that it is at most `largest`: 1 where it is already.

    Folded into the update, clipping costs no pass over the gradients of its own.
    """
    return ((norm + 1e-6) / largest).clamp(min=1)
