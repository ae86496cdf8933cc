import pickle
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.batch import Batch
from pipeline.loader import open_loader
from pipeline.mix import MIXES, CutMix, Mixup, Remix
from pipeline.plan import Stream, TrainPlan
from shards.errors import UserError
from shards.index import Split

KINDS = ("dali", "resident", "torch")
STREAMS = (
    Stream("mixup", augment="shift", mix=Mixup()),
    Stream("remix", -1.0, augment="shift", mix=Remix(per_image=True)),
    Stream("cutmix", augment="shift", mix=CutMix(per_image=True)),
    Stream("two", augment="shift", mix=Mixup(partner="remix", per_image=True)),
    Stream("manifold", augment="shift", mix=Mixup(hidden=True)),
    Stream("manifold of two", augment="shift", mix=Remix(hidden=True, partner="manifold", per_image=True)),
)


def make_plan(split: Split, streams: tuple[Stream, ...] = STREAMS, batch_size: int = 8, **options) -> TrainPlan:
    return TrainPlan(split, streams, batch_size, 16, seed=5, epochs=3, **options)


def load(plan: TrainPlan, kind: str = "torch", steps: int = 3, start_step: int = 0) -> list[dict[str, Batch]]:
    with open_loader(plan, kind, threads=0 if kind == "torch" else 1, start_step=start_step) as loader:
        return list(islice(loader, steps))


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(values) for name, values in vars(batch).items() if values is not None}


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert tensors(ours).keys() == tensors(theirs).keys()
    for name, values in tensors(ours).items():
        assert values.dtype == tensors(theirs)[name].dtype, name
        assert torch.equal(values, tensors(theirs)[name]), name


def expected(plan: TrainPlan, step: int, plain: dict[str, Batch]) -> dict[str, dict[str, list]]:
    """What each stream's batch holds, image by image, by the papers' formulas."""
    counts, made = plan.split.class_counts, {}
    for spec, draw in zip(plan.specs, plan.draws(step), strict=True):
        rows = {"pictures": [], "partners": [], "shares": [], "hidden": []}
        for i, row in enumerate(draw.mixing_B):
            other, j = (spec.name, i + 1 - 2 * (i % 2)) if spec.mix.partner is None else (spec.mix.partner, i)
            mine, theirs = plain[spec.name].images_BHWC[i].double(), plain[other].images_BHWC[j].double()
            label, partner = int(plain[spec.name].labels_B[i]), int(plain[other].labels_B[j])
            share = float(row["share"])
            picture = share * mine + (1 - share) * theirs
            if isinstance(spec.mix, CutMix):
                top, left, bottom, right = row["box"]
                picture = mine.clone()
                picture[top:bottom, left:right] = theirs[top:bottom, left:right]
            if isinstance(spec.mix, Remix):
                ratio = counts[label] / counts[partner]
                share = 0 if ratio >= 3 and share < 0.5 else 1 if ratio <= 1 / 3 and 1 - share < 0.5 else share
            rows["pictures"].append(mine if spec.mix.hidden else picture)
            rows["partners"].append(partner)
            rows["shares"].append(share)
            rows["hidden"].append((j, float(row["share"])))
        made[spec.name] = rows
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_mixes_by_the_papers_formulas(digits, kind):
    plan = make_plan(digits.splits["train"])
    unmixed = replace(plan, specs=[replace(spec, mix=None) for spec in plan.specs])
    for step, (mixed, plain) in enumerate(zip(load(plan, kind), load(unmixed, kind), strict=True)):
        for name, rows in expected(plan, step, plain).items():
            batch, hidden = mixed[name], "manifold" in name
            assert batch.images_BHWC.dtype == (torch.uint8 if hidden or name == "cutmix" else torch.float32)
            torch.testing.assert_close(batch.images_BHWC.double(), torch.stack(rows["pictures"]), rtol=0, atol=1e-4)
            assert torch.equal(batch.labels_B, plain[name].labels_B)
            assert batch.partners_B.tolist() == rows["partners"]
            assert batch.shares_B.dtype == torch.float32
            np.testing.assert_allclose(batch.shares_B, rows["shares"], rtol=0, atol=1e-7)
            weights_C = torch.zeros_like(batch.step_counts_C).index_add(0, batch.labels_B, batch.shares_B)
            weights_C.index_add_(0, batch.partners_B, 1 - batch.shares_B)
            torch.testing.assert_close(batch.step_counts_C, weights_C, rtol=0, atol=1e-5)
            assert (batch.hidden_partners_B is not None) == (batch.hidden_shares_B is not None) == hidden
            if hidden:
                assert (
                    list(zip(batch.hidden_partners_B.tolist(), batch.hidden_shares_B.tolist(), strict=True))
                    == (rows["hidden"])
                )


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_any_number_and_a_resumed_run_see_the_same_mixed_pictures(digits, kind):
    split = digits.splits["train"]
    whole = load(make_plan(split), kind)
    for world_size in (2, 4):
        plans = [make_plan(split, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, *parts in zip(whole[1:], *(load(plan, kind, 2, start_step=1) for plan in plans), strict=True):
            for name, batch in step.items():
                size = 8 // world_size
                for rank, part in enumerate(parts):
                    assert_same(part[name], batch.part(slice(rank * size, (rank + 1) * size)))


def test_each_step_epoch_and_stream_has_a_share_of_its_own(digits):
    plan = make_plan(digits.splits["train"], (Stream("a", mix=Mixup()), Stream("b", mix=Mixup())))
    steps = [0, 1, plan.steps_per_epoch, plan.steps_per_epoch + 1]
    shares = [draw.mixing_B["share"] for step in steps for draw in plan.draws(step)]
    assert len({float(share[0]) for share in shares}) == 2 * len(steps)
    again = [draw.mixing_B["share"] for step in steps for draw in replace(plan).draws(step)]
    assert all(np.array_equal(*pair) for pair in zip(shares, again, strict=True))
    assert not np.isin(shares[0], [draw.mixing_B["share"] for draw in replace(plan, seed=6).draws(0)]).any()


def test_loaders_of_pictures_that_need_no_resize_mix_bit_by_bit_alike(digits):
    plan = make_plan(digits.splits["train"])
    with open_loader(plan, "torch", threads=2) as workers:
        with_workers = list(islice(workers, 3))
    for reference, *others in zip(load(plan), load(plan, "resident"), load(plan, "dali"), with_workers, strict=True):
        for name, other in ((name, other) for other in others for name in reference):
            assert_same(other[name], reference[name])


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_agree_with_the_whole(digits, parts):
    (step,) = load(make_plan(digits.splits["train"], batch_size=16), steps=1)
    size = 16 // parts
    for name, batch in step.items():
        cut = [batch.part(slice(i * size, (i + 1) * size)) for i in range(parts)]
        whole = tensors(batch)
        assert all(torch.equal(part.step_counts_C, batch.step_counts_C) for part in cut)
        for field in whole.keys() - {"hidden_partners_B", "step_counts_C"}:
            assert torch.equal(torch.cat([tensors(part)[field] for part in cut]), whole[field])
        if batch.hidden_partners_B is not None:  # a map that holds the label gives the partner's label
            maps = step["manifold"].labels_B
            assert torch.equal(maps[batch.hidden_partners_B], batch.partners_B)
            for i, part in enumerate(cut):
                assert torch.equal(maps[i * size : (i + 1) * size][part.hidden_partners_B], part.partners_B), name


def test_a_part_that_separates_pairs_is_refused_where_hidden_maps_are_mixed(digits):
    (step,) = load(make_plan(digits.splits["train"]), steps=1)
    for name in ("mixup", "cutmix", "two", "manifold of two"):  # these need nobody else
        assert len(step[name].part(slice(3, 6)).ids_B) == 3
    for part in (slice(0, 3), slice(1, 3), slice(7, 8)):
        with pytest.raises(
            UserError, match=r"^a part of . images separates pairs .*; set optim.accumulate so"
        ) as raised:
            step["manifold"].part(part)
        assert "\n" not in str(raised.value)


def test_shares_are_drawn_from_beta_for_a_batch_or_for_each_image():
    generator = np.random.default_rng(0)
    assert len(np.unique(Mixup().draw(generator, 64, 32)["share"])) == 1
    for alpha in (0.2, 1.0, 4.0):
        shares = Mixup(alpha, per_image=True).draw(generator, 50_000, 32)["share"].astype(float)
        deviation = np.sqrt(1 / (4 * (2 * alpha + 1)))
        assert abs(shares.mean() - 0.5) < 5 * deviation / np.sqrt(50_000)
        assert abs(shares.std() / deviation - 1) < 0.02
    some = Mixup(probability=0.3, per_image=True).draw(generator, 50_000, 32)["share"]
    assert abs((some == 1).mean() - 0.7) < 5 * np.sqrt(0.21 / 50_000)
    assert (Mixup(probability=0).draw(generator, 4, 32)["share"] == 1).all()
    assert np.isfinite(Mixup(1e-9, per_image=True).draw(generator, 100, 32)["share"]).all()


def test_a_share_of_one_changes_no_bit(digits):
    (step,) = load(make_plan(digits.splits["train"], (Stream("s"),)), steps=1)
    images = step["s"].images_BHWC
    for mix in (Mixup(probability=0), Remix(probability=0), CutMix(probability=0)):
        assert torch.equal(mix.blend(images, images.flip(0), mix.draw(np.random.default_rng(0), 8, 16)), images)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_a_cutmix_share_is_the_part_of_the_pixels_that_is_left(size):
    rows = CutMix(per_image=True).draw(np.random.default_rng(1), 500, size)
    own, partner = torch.zeros((500, size, size, 3), dtype=torch.uint8), torch.full((500, size, size, 3), 255).byte()
    mixed = CutMix().blend(own, partner, rows)
    assert mixed.dtype == torch.uint8
    assert set(mixed.unique().tolist()) <= {0, 255}
    np.testing.assert_allclose((mixed == 0).float().mean(dim=(1, 2, 3)), rows["share"], atol=1e-6)
    if size == 32:
        lambdas = Mixup(per_image=True).draw(np.random.default_rng(1), 500, size)["share"]
        sides = [2 * (int(size * np.sqrt(1 - share)) // 2) for share in lambdas]
        tops, ends = rows["box"][:, :2], rows["box"][:, 2:]
        inside = ((tops > 0) & (ends < size)).all(axis=1)  # where no border clips the box
        assert inside.sum() > 50
        np.testing.assert_array_equal((ends - tops)[inside], np.repeat(sides, 2).reshape(-1, 2)[inside])
        assert 0.5 < rows["share"].mean() < 0.75  # clipping leaves more than a half of the picture


@pytest.mark.parametrize(
    ("own", "partner", "share", "expected"),
    [
        (300, 100, 0.4, 0.0),  # three times as large, and its share below a half: all to the rare partner
        (299, 100, 0.4, 0.4),
        (300, 100, 0.5, 0.5),
        (100, 300, 0.6, 1.0),
        (100, 300, 0.5, 0.5),
        (100, 299, 0.6, 0.6),
        (100, 300, 0.4, 0.4),
        (100, 100, 0.1, 0.1),
    ],
)
def test_remix_gives_the_label_to_the_rarer_class(own, partner, share, expected):
    rows = np.array([(share,)], dtype=Remix.row)
    (shown,) = Remix().label_shares(rows, np.array([0]), np.array([1]), np.array([own, partner]))
    assert shown == np.float32(expected)


def test_neighbours_are_partners_of_each_other():
    assert Mixup().partner_rows(6).tolist() == [1, 0, 3, 2, 5, 4]
    assert Mixup(partner="other").partner_rows(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(alpha=0), "mixup has alpha=0; it must be above 0"),
        (lambda: Mixup(alpha=float("nan")), "mixup has alpha=nan; it must be above 0"),
        (lambda: CutMix(probability=1.5), "cutmix has probability=1.5; it must be from 0 to 1"),
        (lambda: Remix(kappa=0.5), "remix has kappa=0.5; it must be at least 1"),
        (lambda: Remix(tau=-1), "remix has tau=-1; it must be from 0 to 1"),
        (lambda: CutMix(hidden=True), "cutmix pastes pictures and cannot mix hidden maps; use mixup or remix"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(UserError) as raised:
        make()
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("streams", "options", "message"),
    [
        (
            (Stream("a", mix=Mixup()),),
            {"batch_size": 6, "world_size": 2},
            "stream 'a' mixes images in pairs and input.batch_size=6 gives each of the 2 processes 3; make it a"
            " multiple of 4",
        ),
        ((Stream("a", mix=Mixup()),), {"batch_size": 1}, "stream 'a' mixes images in pairs and input.batch_size=1"),
        (
            (Stream("a", mix=Mixup(partner="c")), Stream("b")),
            {},
            "stream 'a' is mixed with 'c', which is no other stream; the others are: b",
        ),
        ((Stream("a", mix=Mixup(partner="a")),), {}, "stream 'a' is mixed with 'a', which is no other stream;"),
        (
            (Stream("a", mix=Mixup(partner="b", hidden=True)), Stream("b", mix=CutMix())),
            {},
            "stream 'a' mixes hidden maps with 'b', whose pictures are mixed themselves;",
        ),
    ],
)
def test_streams_that_cannot_be_mixed_are_named(digits, streams, options, message):
    with pytest.raises(UserError) as raised:
        make_plan(digits.splits["train"], streams, **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_two_streams_may_be_mixed_whatever_the_batch(digits):
    plan = make_plan(digits.splits["train"], (Stream("a", mix=Mixup(partner="b")), Stream("b")), batch_size=3)
    (step,) = load(plan, steps=1)
    assert torch.equal(step["a"].partners_B, step["b"].labels_B)


def test_a_mix_is_found_by_its_name_and_pickles():
    for name, mix in MIXES.items():
        assert mix.name == name
        assert pickle.loads(pickle.dumps(mix(0.5))) == mix(0.5)


@pytest.mark.gpu
def test_a_gpu_blends_alike():
    generator = np.random.default_rng(0)
    images, partners = torch.from_numpy(generator.integers(0, 256, (2, 64, 32, 32, 3), dtype=np.uint8))
    for mix in (Mixup(per_image=True), CutMix(per_image=True)):
        rows = mix.draw(generator, 64, 32)
        torch.testing.assert_close(
            mix.blend(images.cuda(), partners.cuda(), rows).cpu(), mix.blend(images, partners, rows)
        )
