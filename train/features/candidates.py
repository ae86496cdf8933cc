"""Second stages side by side: classifiers on the same features, each with its settings chosen on the held-out split.

    stage one           its own classifier
    logit adjustment    τ·log prior taken off stage one's logits               (Menon et al., ICLR 2021)
    tau-normalized      rows of W divided by their norm's power τ, no bias     (Kang et al., ICLR 2020, section 4.2)
    NCM                 the nearest class mean, by angle or by distance        (section 4.2)
    LWS                 learnable weight scaling on balanced draws, 5 epochs   (section 4.2)
    cRT                 a fresh classifier, likewise, 10 epochs                (section 4.1)
    MiSLAS              scales and weights on balanced draws, smoothed labels  (Zhong et al., CVPR 2021)
    no generation       AFG's classifier on the real features alone
    oversampling        AFG's classifier on real features, every class n_max times
    own Gaussian        AFG with β = 0: nothing is borrowed

from simple to complex. train/afg.py shows all but NCM and MiSLAS beside itself; train/decouple.py makes one of them a
run.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from analysis.metrics import percent, summarize
from shards.errors import UserError
from train.features.classifiers import logit_adjusted, measure, nearest_means, tau_normalized
from train.features.commands import RATES, SMOOTHINGS, ClassifierOptim, ReferenceOptim
from train.features.mixing import Mixture, Sampling
from train.features.passes import Passes, Source
from train.features.recipes import Kind, Recipe, Trained

Bank = tuple[Tensor, Tensor]
# Values of τ that the held-out split chooses from. The first is taken where nothing chooses.
TAUS = (1.0, *(t / 10 for t in range(21) if t != 10))
# A grid of rates whose end wins is extended by RATE_STEP, up to this factor of the first rate either way.
RATE_STEP, RATE_BOUND = 4.0, 4.0**6
# Families that are trained as their reference trains them, and the kind of their classifiers.
REFERENCES: dict[str, Kind] = {"cRT": "linear", "LWS": "lws", "MiSLAS": "scaled"}
# Images a class that the held-out split needs on average; with fewer, a choice among classifiers is mostly noise.
IMAGES_TO_CHOOSE = 10


@dataclass(frozen=True)
class Candidate:
    """A classifier at one value of its settings.

    Attributes:
        setting: what distinguishes it from others of its family.
        linear: the classifier.
        trained: how it was trained, if it was.
        score: from `Judge.score`.
    """

    setting: dict[str, Any]
    linear: nn.Linear
    trained: Trained | None = None
    score: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Judge:
    """Chooses on the held-out split, and reports on the test split. The two never meet.

    Attributes:
        watched: the held-out split's features and labels, or None.
        test: the test split's.
        train_counts_C: n_j, which decide many, medium and few.
    """

    watched: Bank | None
    test: Bank
    train_counts_C: Any

    @property
    def images_per_class(self) -> float:
        """Held-out images per class, on average."""
        return 0.0 if self.watched is None else len(self.watched[1]) / len(self.train_counts_C)

    @property
    def chooses(self) -> bool:
        """Whether the held-out split is large enough to choose anything on."""
        return self.images_per_class >= IMAGES_TO_CHOOSE

    def score(self, linear: nn.Linear) -> tuple[float, float]:
        """Return balanced accuracy and minus the loss: small held-out splits tie often, then the loss decides."""
        if self.watched is None:
            return 0.0, 0.0
        total, loss = measure(linear, self.watched)
        return summarize(total, self.train_counts_C)["balanced_accuracy"] or 0.0, -loss

    def scored(self, candidate: Candidate) -> Candidate:
        """Return the candidate with its score."""
        return replace(candidate, score=self.score(candidate.linear))

    def best(self, candidates: Iterable[Candidate]) -> Candidate:
        """Return the candidate of the highest score; the first where nothing can be chosen."""
        return max(candidates, key=lambda one: one.score) if self.chooses else next(iter(candidates))

    def report(self, linear: nn.Linear) -> dict[str, float | None]:
        """Return the figures on the test split."""
        return summarize(measure(linear, self.test)[0], self.train_counts_C)


@dataclass
class Families:
    """Everything that makes candidates: stage one, the features, and who judges.

    Attributes:
        stage_one: its classifier.
        mixture: the features, in stage one's space.
        judge: chooses.
        passes: trains.
        optim: of no generation, oversampling and AFG.
        reference: of cRT, LWS and MiSLAS.
        kind: AFG's classifier.
        rates: factors of each rate that are tried; where there is one, it is kept.
        q: the sampler of cRT, LWS and MiSLAS: 0, classes in balance; or 1, every feature once, over and over until as
            many are seen.
        weights: of classes, in the loss of these three; see `Recipe`.
    """

    stage_one: nn.Linear
    mixture: Mixture
    judge: Judge
    passes: Passes
    optim: ClassifierOptim
    reference: ReferenceOptim
    kind: Kind = "scaled"
    rates: Sequence[float] = RATES
    q: Literal[0, 1] = 0
    weights: str = "none"

    @cached_property
    def unit(self) -> float:
        """See `Mixture.unit`, which reads all features."""
        return self.mixture.unit

    def closed(self, name: str) -> Iterator[Candidate]:
        """Yield the candidates of a family that needs no training: with thousands of classes each takes memory."""
        first, counts_C = self.stage_one, self.mixture.gaussians.counts_C
        made: Iterator[Candidate]
        if name == "stage one":
            made = iter([Candidate({}, first)])
        elif name == "logit adjustment":
            made = (Candidate({"tau": t}, logit_adjusted(first, counts_C, t)) for t in TAUS)
        elif name == "tau-normalized":
            made = (Candidate({"tau": t}, tau_normalized(first, t)) for t in TAUS)
        else:
            assert name == "NCM", name
            bank = (self.mixture.features_ND, self.mixture.labels_N, len(counts_C))
            made = (Candidate({"by": by}, nearest_means(*bank, by == "angle")) for by in ("angle", "distance"))
        yield from map(self.judge.scored, made)

    def recipes(self, name: str) -> tuple[Source, list[Recipe]]:
        """Return what a trained family on real features sees, and its recipes at the first rate."""
        o, r = self.optim, self.reference
        if name in REFERENCES:
            epochs, passes = r.lws_epochs if name == "LWS" else r.crt_epochs, 1.0
            if self.q == 1:
                counts_C = self.mixture.gaussians.counts_C
                passes = len(counts_C) * int(counts_C.max()) / int(counts_C.sum())
            kind, epochs = REFERENCES[name], round(epochs * passes)
            plain = Recipe(kind, epochs, r.lr, r.momentum, r.weight_decay, early_cosine=True, weights=self.weights)
            source = Source("oversampled" if self.q == 0 else "each-once", r.batch_size)
            if name == "MiSLAS":
                # ε of the largest and the smallest class, and the rate of W beside that of the scales, which in the
                # authors' configurations lies between 0.05 and 0.5.
                plain = replace(plain, early_cosine=False, weight_rate=0.1)
                return source, [replace(plain, smoothing=ends) for ends in SMOOTHINGS]
            return source, [plain]
        sampling: Sampling = "each-once" if name == "no generation" else "oversampled"
        recipe = Recipe(self.kind, o.epochs, o.lr, o.momentum, o.weight_decay, self.unit)
        return Source(sampling, o.batch_size), [recipe]

    def on_real_features(self, *names: str) -> dict[str, list[Candidate]]:
        """Train families on real features, those that see the same ones together; see `search`."""
        found: dict[str, list[Candidate]] = {}
        by_source: dict[Source, dict[str, list[Recipe]]] = {}
        for name in names:
            source, recipes = self.recipes(name)
            by_source.setdefault(source, {})[name] = recipes
        for source, families in by_source.items():
            found |= self.search(source, families)
        return {name: found[name] for name in names}

    def search(self, source: Source, families: Mapping[str, Sequence[Recipe]]) -> dict[str, list[Candidate]]:
        """Train every recipe at every rate, and at further ones while the largest or the smallest rate wins.

        Args:
            source: the features.
            families: by name, recipes at the first rate. Where nothing can be chosen, the first is trained alone.

        Returns:
            By name, the candidates; those whose loss was not finite are left out.

        Raises:
            UserError: no rate of a family gives a finite loss.
        """
        rates = self.rates if self.judge.chooses else self.rates[:1]
        wanted = {
            name: [
                replace(one, lr=one.lr * rate) for rate in rates for one in recipes[: None if self.judge.chooses else 1]
            ]
            for name, recipes in families.items()
        }
        found: dict[str, list[Candidate]] = {name: [] for name in families}
        tried: dict[str, list[float]] = {name: [] for name in families}
        while any(wanted.values()):
            flat = [(name, recipe) for name, recipes in wanted.items() for recipe in recipes]
            trained = self.passes.train(source, [recipe for _, recipe in flat])
            for (name, recipe), one in zip(flat, trained, strict=True):
                tried[name].append(recipe.lr)
                if one.linear is not None:
                    found[name].append(self.judge.scored(Candidate(setting_of(recipe), one.linear, one)))
            wanted = {name: [] for name in families}
            for name, recipes in families.items():
                if not found[name]:
                    raise UserError(
                        f"{name}: the loss is not finite at any rate from {min(tried[name]):g} to"
                        f" {max(tried[name]):g}; lower {'reference' if name in REFERENCES else 'optim'}.lr"
                    )
                if len(rates) > 1:
                    further = _further(self.judge.best(found[name]), tried[name], recipes[0].lr)
                    wanted[name] = [further] if further else []
        return found


def _further(best: Candidate, tried: Sequence[float], first: float) -> Recipe | None:
    """Return the best recipe at the next rate, where its rate is the end of what was tried."""
    assert best.trained is not None
    recipe = best.trained.recipe
    for end, step in ((max(tried), RATE_STEP), (min(tried), 1 / RATE_STEP)):
        rate = recipe.lr * step
        if recipe.lr == end and 1 / RATE_BOUND <= rate / first <= RATE_BOUND:
            return replace(recipe, lr=rate)
    return None


def setting_of(recipe: Recipe) -> dict[str, Any]:
    """Return what was or could be chosen in a recipe."""
    setting: dict[str, Any] = {} if recipe.beta is None else {"beta": recipe.beta}
    setting["lr"] = recipe.lr
    if recipe.beta is not None:
        setting |= {"distill": recipe.distill} | ({"teacher_tau": recipe.teacher_tau} if recipe.distill else {})
    if any(recipe.smoothing):
        setting |= {"smoothing_head": recipe.smoothing[0], "smoothing_tail": recipe.smoothing[1]}
    return setting


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows of `name`, `setting` and figures as aligned text, in percent."""
    columns = ("top1", "balanced_accuracy", "many", "medium", "few")
    cells = [["classifier", "chosen", "overall", "balanced", *columns[2:]]]
    for row in rows:
        chosen = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row["setting"].items()
        )
        cells.append([row["name"], chosen, *(percent(row[column]) for column in columns)])
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]))
    return "\n".join(lines)
