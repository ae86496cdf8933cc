"""Passes over features: which classifiers train together, within memory, and what a stopped run keeps of them.

runs/digits-afg-1/candidates/<key>.safetensors    the classifiers of a finished pass, until the run is finished
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from shards.atomic import partial_folder
from train.features.mixing import Mixture, Sampling, mixed_epoch, real_epoch
from train.features.recipes import Recipe, Trained
from train.features.training import PASS_VALUES, Stack, Views, train_together

FOLDER = "candidates"
SEEN = {
    "each-once": "the real features",
    "oversampled": "the real features, balanced",
    "generated": "real and generated features",
}


@dataclass(frozen=True)
class Source:
    """What classifiers see: real features, or real and generated ones at their β; and how many at a time."""

    sampling: Sampling | Literal["generated"]
    batch_size: int


@dataclass
class Passes:
    """Trains classifiers on their features, together where that is possible.

    Attributes:
        stage_one: its classifier.
        mixture: the features.
        seed: of everything random: every pass of a source sees the same real features in the same order. Generated
            ones have the same parents, and other noise where a pass has one β and not several.
        average: gives the mean of a tensor over all ranks.
        say: takes a line per pass.
        silent: no progress bar.
        folder: where finished passes are kept, or None.
        writes: whether this process writes there.
        salt: whatever else decides what a pass gives.
    """

    stage_one: nn.Linear
    mixture: Mixture
    seed: int
    average: Callable[[Tensor], Tensor] = lambda tensor: tensor
    say: Callable[[str], None] = lambda line: None
    silent: bool = True
    folder: Path | None = None
    writes: bool = True
    salt: Any = field(default_factory=dict)

    @property
    def at_once(self) -> int:
        """How many classifiers a pass may train."""
        return max(1, PASS_VALUES // (3 * self.stage_one.weight.numel()))

    def train(self, source: Source, recipes: Sequence[Recipe]) -> list[Trained]:
        """Train a classifier per recipe, in as few passes as memory allows; or find those of a finished pass."""
        found: list[Trained] = []
        for start in range(0, len(recipes), self.at_once):
            together = list(recipes[start : start + self.at_once])
            kept = self._read(source, together)
            if kept is None:
                kept = self._train(source, together)
                self._write(source, together, kept)
            found += kept
        return found

    def stacks(self, recipes: Sequence[Recipe]) -> tuple[list[Stack], list[list[int]]]:
        """Return a stack per β and momentum, those of lws apart, and which recipes each holds."""
        kinds = [(recipe.beta, recipe.kind == "lws", recipe.momentum) for recipe in recipes]
        places = [[i for i, one in enumerate(kinds) if one == kind] for kind in dict.fromkeys(kinds)]
        counts_C, head_C = self.mixture.train_counts, self.mixture.support.head_C
        return [
            Stack(self.stage_one, [recipes[i] for i in inside], counts_C, head_C, self.seed) for inside in places
        ], places

    def epochs(self, source: Source, betas: Sequence[float | Tensor | None]) -> tuple[Callable[[], Views], int]:
        """Return what gives an epoch's batches, with a view for each β, and how many there are."""
        generator = torch.Generator().manual_seed(self.seed)
        mixture = self.mixture
        share = max(1, source.batch_size // mixture.world_size)
        counts_C = mixture.gaussians.counts_C
        if source.sampling == "generated":
            at = [beta for beta in betas if beta is not None]
            number = int(counts_C.sum() + mixture.targets_C.sum())
            memory = mixture.workspace(len(at))
            return (lambda: mixed_epoch(mixture, at, share, generator, memory)), -(
                -number // mixture.world_size // share
            )
        sampling: Sampling = source.sampling
        number = int(counts_C.max()) * len(counts_C) if sampling == "oversampled" else len(mixture.labels_N)

        def real() -> Views:
            for features_BD, labels_B in real_epoch(mixture, sampling, share, generator):
                yield [features_BD] * len(betas), labels_B

        return real, -(-number // mixture.world_size // share)

    def _train(self, source: Source, recipes: Sequence[Recipe]) -> list[Trained]:
        started = time.perf_counter()
        stacks, places = self.stacks(recipes)
        batches, steps = self.epochs(source, [recipes[inside[0]].beta for inside in places])
        title = _title(source, recipes)
        per_stack = train_together(stacks, batches, steps, title, self.average, silent=self.silent)
        found: dict[int, Trained] = {}
        for inside, trained in zip(places, per_stack, strict=True):
            found |= zip(inside, trained, strict=True)
        self.say(f"{title}: {time.perf_counter() - started:.0f} s")
        return [found[i] for i in range(len(recipes))]

    def _file(self, source: Source, recipes: Sequence[Recipe]) -> Path | None:
        if self.folder is None:
            return None
        what = [asdict(source), [asdict(recipe) for recipe in recipes], self.seed, self.mixture.world_size, self.salt]
        key = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return self.folder / FOLDER / f"{key}.safetensors"

    def _read(self, source: Source, recipes: Sequence[Recipe]) -> list[Trained] | None:
        path = self._file(source, recipes)
        if path is None or not path.exists():
            return None
        found = []
        try:
            with safe_open(path, "pt") as file:
                for i, (recipe, rows) in enumerate(zip(recipes, json.loads(file.metadata()["rows"]), strict=True)):
                    linear = None
                    if f"{i}.weight" in file.keys():  # noqa: SIM118
                        linear = nn.utils.skip_init(nn.Linear, *reversed(self.stage_one.weight.shape))
                        linear.weight.data, linear.bias.data = (
                            file.get_tensor(f"{i}.weight"),
                            file.get_tensor(f"{i}.bias"),
                        )
                        linear.to(self.stage_one.weight.device)
                    found.append(Trained(recipe, linear, rows))
        except (OSError, SafetensorError, ValueError, KeyError):
            return None  # damaged: trained again
        self.say(f"{_title(source, recipes)}: trained before the run was stopped")
        return found

    def _write(self, source: Source, recipes: Sequence[Recipe], trained: Sequence[Trained]) -> None:
        path = self._file(source, recipes)
        if path is None or not self.writes:
            return
        tensors = {
            f"{i}.{name}": value.detach().cpu().contiguous()
            for i, one in enumerate(trained)
            if one.linear is not None
            for name, value in one.linear.named_parameters()
        }
        try:
            path.parent.mkdir(exist_ok=True)
            with partial_folder(path.parent / ".partial") as temporary:
                content = save(tensors, {"rows": json.dumps([one.rows for one in trained])})
                (temporary / path.name).write_bytes(content)
                (temporary / path.name).rename(path)
        except OSError as error:  # it would only save time
            self.say(f"note: this pass is not kept for a run that is resumed ({error})")


def _title(source: Source, recipes: Sequence[Recipe]) -> str:
    what = "classifier" if len(recipes) == 1 else "classifiers"
    return f"{len(recipes)} {what} on {SEEN[source.sampling]}"
