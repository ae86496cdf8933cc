"""The optimiser: its settings, which parameters have which rate, and how the rate goes over the run.

rate of a parameter  =  lr  ×  schedule  ×  lr_scale of its part  ×  layer_decay ^ layers above it

                  stem ── block ── … ── block ── branches ── classifier
part                         trunk                branches    classifier
layers above it    L+1      L              2         1            0
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
)

from shards.errors import UserError

if TYPE_CHECKING:  # torch would be what --help waits for
    import torch

    from train.engine.method import Method
    from train.engine.model import Model
    from train.networks.depths import Part
    from train.networks.networks import Network


@dataclass
class Optim:
    """The optimiser and its learning rate.

    Attributes:
        epochs: passes over the training images.
        optimizer: sgd, or adamw, which suits fine-tuning and transformers and wants rates of 1e-3 and below.
        lr: the learning rate after warm-up.
        momentum: of SGD.
        nesterov: whether SGD's momentum is Nesterov's.
        betas: of AdamW: the decays of its averages of gradients and of their squares.
        weight_decay: SGD: L2, on all parameters. AdamW: decoupled, but not on biases, norms and position embeddings.
        layer_decay: the rate of each layer as a share of the rate of the layer above it, such as 0.75: what is
            pretrained changes the less the earlier it stands.
        lr_scale_trunk: a factor of the rate of the shared layers.
        lr_scale_branches: a factor of the rate of the last block, or of both branches.
        lr_scale_classifier: a factor of the classifier's rate, and of what else a method trains beside its network.
        freeze: trunk: only branches and classifier are trained; the trunk's batch norm keeps its statistics.
        schedule: step (times `decay` at each milestone), cosine (to 0), or constant.
        warmup_epochs: epochs at the start over which the rate rises linearly. Without any, BBN stays stuck at a
            rate of 0.1: its doubled features make the first steps too large.
        warmup_steps: steps over which it rises, in the place of `warmup_epochs`; the whole schedule goes by steps then,
            and not by epochs.
        warmup_start: the share of the rate that warm-up starts from, at epoch 0, before the first; BBN's is a third.
        milestones: at which shares of the epochs the rate drops (so that drops scale with `epochs`): 0.6 of 200 makes
            epoch 120 the first one with the lower rate, as BBN's code does.
        decay: the factor of each drop.
        accumulate: in how many parts a process works through its share of a batch, to need less memory. Batch norm
            sees the parts one by one.
        clip_norm: the largest norm that a step's gradient may have.
        ema: the decay of an exponential moving average of the weights and of batch norm's statistics, such as 0.999,
            which is then what is evaluated and kept.
    """

    epochs: PositiveInt = 200
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 0.1
    momentum: ClosedUnitInterval = 0.9
    nesterov: bool = True
    betas: tuple[OpenUnitInterval, OpenUnitInterval] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 2e-4
    layer_decay: OpenUnitInterval | None = None
    lr_scale_trunk: PositiveFloat = 1.0
    lr_scale_branches: PositiveFloat = 1.0
    lr_scale_classifier: PositiveFloat = 1.0
    freeze: Literal["trunk"] | None = None
    schedule: Literal["step", "cosine", "constant"] = "step"
    warmup_epochs: NonNegativeInt = 5
    warmup_steps: NonNegativeInt | None = None
    warmup_start: ClosedUnitInterval = 1 / 3
    milestones: list[ClosedUnitInterval] = field(default_factory=lambda: [0.6, 0.8])
    decay: PositiveFloat = 0.01
    accumulate: PositiveInt = 1
    clip_norm: PositiveFloat | None = None
    ema: OpenUnitInterval | None = None


# AdamW moves every weight by about the rate in each step, however small its gradient.
HIGH_FOR_ADAMW = 0.01
# What decides which parameters are trained together; an optimiser's state fits no others.
SHAPING = (
    "optimizer", "layer_decay", "lr_scale_trunk", "lr_scale_branches", "lr_scale_classifier", "freeze",
)  # fmt: skip


def check_settings(optim: Optim, model: "Model", grad_checkpointing: bool, given: Collection[str]) -> None:
    """Refuse settings that exclude each other.

    Args:
        optim: of a run to be.
        model: its network's.
        grad_checkpointing: loop.grad_checkpointing.
        given: dotted names of the settings that were asked for; what a preset says is overruled by them in silence.

    Raises:
        UserError: names both.
    """

    def said(name: str) -> str:
        return f"optim.{name}={getattr(optim, name)}"

    def asked(*names: str) -> list[str]:
        return [name for name in names if f"optim.{name}" in given]

    others, owner = (("momentum", "nesterov"), "sgd") if optim.optimizer == "adamw" else (("betas",), "adamw")
    for name in asked(*others):
        raise UserError(
            f"{said(name)} and {said('optimizer')} exclude each other; leave out optim.{name}, or use"
            f" --optim.optimizer {owner}"
        )
    if optim.warmup_steps is not None and asked("warmup_epochs"):
        raise UserError(
            f"{said('warmup_epochs')} and {said('warmup_steps')} exclude each other; leave one out, or set"
            " --optim.warmup_steps null"
        )
    for name in asked("milestones", "decay") if optim.schedule != "step" else ():
        raise UserError(
            f"{said(name)} and {said('schedule')} exclude each other; leave out optim.{name}, or use"
            " --optim.schedule step"
        )
    if optim.freeze is None:
        return
    for name in asked("layer_decay", "lr_scale_trunk"):
        if getattr(optim, name) not in (None, 1.0):
            raise UserError(f"{said('freeze')} and {said(name)} exclude each other: a frozen trunk has no rate")
    if grad_checkpointing:
        raise UserError(
            f"{said('freeze')} and loop.grad_checkpointing exclude each other: nothing of a frozen trunk is kept"
            " for the backward pass"
        )
    if model.adapt is not None:
        raise UserError(f"{said('freeze')} and model.adapt={model.adapt} exclude each other: adapters lie in the trunk")
    if model.weights is None:
        raise UserError(
            f"{said('freeze')} without model.weights would keep a trunk of random weights; give pretrained ones with"
            " --model.weights"
        )


def check_resumed(optim: Optim, begun_with: Mapping[str, Any], run: Any) -> None:
    """Refuse to resume a run with settings that its optimiser's state does not fit.

    Args:
        optim: the settings now.
        begun_with: the section of the run's config.yaml, which may be older than some settings.
        run: its folder.

    Raises:
        UserError: names the setting and both values.
    """
    for name in SHAPING:
        now, before = getattr(optim, name), begun_with.get(name, Optim.__dataclass_fields__[name].default)
        if now != before:
            raise UserError(
                f"{run} was begun with optim.{name}={before} and cannot be resumed with {now}; begin another run"
            )


def make_optimizer(method: "Method", optim: Optim) -> "torch.optim.Optimizer":
    """Return the optimiser of a method's parameters, without those that are frozen."""
    import torch

    groups = parameter_groups(method, optim)
    # Plain numbers: a checkpoint holds them, and is loaded as plain data, without the command line's own types.
    lr, weight_decay = float(optim.lr), float(optim.weight_decay)
    if optim.optimizer == "adamw":
        first, second = map(float, optim.betas)
        return torch.optim.AdamW(groups, lr=lr, betas=(first, second), weight_decay=weight_decay)
    momentum = float(optim.momentum)
    return torch.optim.SGD(
        groups,
        lr=lr,
        momentum=momentum,
        nesterov=optim.nesterov and momentum > 0,
        weight_decay=weight_decay,
    )


def parameter_groups(method: "Method", optim: Optim) -> list[dict[str, Any]]:
    """Return a method's groups of parameters, cut by what the settings say of parts and layers.

    Returns:
        The method's own groups where they say nothing; else groups with an `lr_scale`, in which the method's own is
        contained, and with a `weight_decay` of 0 where the optimiser's does not apply.
    """
    groups = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]} for group in method.parameter_groups()
    ]
    groups = [group for group in groups if group["params"]]
    scales: dict[Part, float] = {
        "trunk": optim.lr_scale_trunk,
        "branch": optim.lr_scale_branches,
        "classifier": optim.lr_scale_classifier,
    }
    decoupled = optim.optimizer == "adamw"
    if not decoupled and optim.layer_decay is None and set(scales.values()) == {1.0}:
        return groups
    places = parameter_places(method.model)
    cut: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            place = places.get(parameter, Place("classifier", 0, parameter.ndim <= 1))
            scale = group.get("lr_scale", 1.0) * scales[place.part] * (optim.layer_decay or 1.0) ** place.above
            spared = decoupled and place.spared
            own = {"weight_decay": 0.0} if spared else {}
            one = cut.setdefault((number, scale, spared), {**group, **own, "params": [], "lr_scale": scale})
            one["params"].append(parameter)
    return list(cut.values())


class Place(NamedTuple):
    """Where a parameter stands.

    Attributes:
        part: of the network.
        above: layers between it and the logits.
        spared: whether AdamW's weight decay leaves it alone: biases, norms, and what timm exempts of its models, such
            as position embeddings.
    """

    part: "Part"
    above: int
    spared: bool


def parameter_places(model: "Network") -> "dict[torch.nn.Parameter, Place]":
    """Return where each of a network's parameters stands; see the picture above."""
    from train.networks.depths import part_of

    exempt = [
        f"{prefix}.{pattern}"
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for pattern in module.no_weight_decay()
    ]

    def is_spared(name: str, parameter: "torch.nn.Parameter") -> bool:
        return parameter.ndim <= 1 or any(fnmatchcase(name, pattern) for pattern in exempt)

    depths = model.parameter_depths()
    top = max(depths.values())
    return {
        parameter: Place(part_of(name), top - depths[name], is_spared(name, parameter))
        for name, parameter in model.named_parameters()
    }


def lr_factor(optim: Optim, epoch: int, step: int = 0, steps_per_epoch: int = 1) -> float:
    """Return the learning rate's factor in an epoch counted from 1, as the papers' codes count.

    Warm-up rises linearly from `warmup_start`, reached at epoch 0, to 1 at its last epoch, a stair an epoch; a drop
    counts from its milestone's epoch on. Both are BBN's (lib/utils/lr_scheduler.py, stepped before each epoch).

    With `warmup_steps` the same is done step by step: steps take the places of epochs.

    Args:
        optim: the settings.
        epoch: from 1.
        step: within the epoch, from 0; only looked at with `warmup_steps`.
        steps_per_epoch: likewise.
    """
    now, last, warmup = epoch, optim.epochs, optim.warmup_epochs
    if optim.warmup_steps is not None:
        now, last = (epoch - 1) * steps_per_epoch + step + 1, optim.epochs * steps_per_epoch
        warmup = optim.warmup_steps
    if now <= warmup:
        return optim.warmup_start + (1 - optim.warmup_start) * now / warmup
    if optim.schedule == "step":
        # Not the first one: a run of an epoch or two would never have the rate that was asked for.
        return optim.decay ** sum(now >= max(2, round(share * last)) for share in optim.milestones)
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (now - 1 - warmup) / (last - warmup)))
    return 1.0


def warnings_about(optim: Optim, steps_per_epoch: int) -> list[str]:
    """Return lines to print about a rate that will hardly do."""
    lines = []
    unit, last = ("epochs", optim.epochs) if optim.warmup_steps is None else ("steps", optim.epochs * steps_per_epoch)
    warmup = getattr(optim, f"warmup_{unit}")
    if warmup > last:
        reached = optim.lr * lr_factor(optim, optim.epochs, steps_per_epoch - 1, steps_per_epoch)
        lines.append(
            f"warning: optim.warmup_{unit}={warmup} is more than the {last} {unit}: the rate rises to {reached:.2g}"
            f" only, not to optim.lr={optim.lr:g}; lower it"
        )
    if optim.warmup_steps is None and optim.warmup_epochs == 1 < optim.epochs:
        lines.append(
            "warning: optim.warmup_epochs=1 warms nothing up: the rate is the same throughout an epoch, and the first"
            f" one already has optim.lr={optim.lr:g}; give 2 or more, or --optim.warmup_steps {steps_per_epoch}"
        )
    if optim.optimizer == "adamw" and optim.lr >= HIGH_FOR_ADAMW:
        lines.append(
            f"warning: optim.lr={optim.lr:g} suits SGD; AdamW usually has about 1e-3 from noise and 1e-4 or less with"
            " pretrained weights"
        )
    return lines
