"""The frozen prefix runs once per image, whatever happens in between, and its rows are right."""

import hmac
import json
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from client.data.records import ArrayImage, FileImage
from client.features.extract import FeatureSpec, Prepared, make_namer, prepare_images
from client.features.store import Stores
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Augment, Study, Train
from common.errors import DataError
from common.model.images import Preprocess
from common.model.network import assemble
from common.model.split import cut_at
from simulations.sites.pretrain import WEIGHTS

pytestmark = pytest.mark.numbers

OPS = ("flip", "rotate", "crop", "brightness")
SMALL = Preprocess(resize=16, crop=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


class Prefix(nn.Module):
    """A small frozen prefix that counts its images, and can be interrupted after so many."""

    def __init__(self, seed=0, most=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, stride=2)
        for p in self.conv.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
        self.images, self.most = 0, most

    def __deepcopy__(self, memo):
        return self  # copies count together

    def forward(self, batch):
        images = int(
            (batch != batch[..., :1, :1]).flatten(1).any(1).sum()
        )  # of one colour: filling
        if self.most is not None and self.images + images > self.most:
            raise KeyboardInterrupt
        self.images += images
        return self.conv(batch)


def counting(preprocess=SMALL, **changes):
    """A spec whose prefix has counted nothing yet."""
    prefix = Prefix(**changes)
    return FeatureSpec(prefix=prefix, preprocess=preprocess)


def images(count, start=0, side=20):
    return [
        ArrayImage(
            np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8), f"image {i}"
        )
        for i in range(start, start + count)
    ]


def ready(cache, some, spec, *, views=1, skip=False):
    augment = Augment(views=views, ops=OPS) if views > 1 else Augment()
    options = {"spec": spec, "augment": augment, "skip_unreadable": skip}
    return prepare_images(some, cache=cache, stores=process[0], **options)


def rows(cache, some, spec, **options):
    prepared, _ = ready(cache, some, spec, **options)
    return prepared.rows[torch.arange(len(prepared.rows))]


process = [Stores()]


def restart():
    """As if in a new process."""
    process[0] = Stores()


def network(backbone, unfreeze, size=64, weights="none", seed=0):
    return assemble(
        Study(
            name="t",
            classes=("a", "b", "c"),
            model={"backbone": backbone, "weights": weights, "unfreeze": unfreeze, "init": "zero"},
            images={"size": size},
            train={"rounds": 1},
            seed=seed,
        ),
        weights,
    )


def recipe_of(net, keep="auto"):
    return FeatureSpec.of(net, "float32", keep)


def direct(spec, some):
    """Activations without any cache."""
    pixels = torch.stack([image.square(spec.preprocess) for image in some])
    with torch.no_grad():
        return spec.prefix(spec.preprocess.normalise(pixels))


# --- rows are right ---


@pytest.mark.parametrize(
    ("backbone", "unfreeze", "weights"),
    [
        ("shufflenet_v2_x0_5", "head", str(WEIGHTS)),
        ("squeezenet1_1", "last:1", "none"),
        ("resnet18", "last:1", "none"),
    ],
)
def test_cached_activations_are_the_prefix_run_directly(tmp_path, backbone, unfreeze, weights):
    net = network(backbone, unfreeze, weights=weights)
    spec, some = recipe_of(net), images(5, side=70)
    prepared, kept = ready(tmp_path, some, spec)
    found = prepared.rows[torch.arange(5)]
    assert kept == [0, 1, 2, 3, 4]
    assert spec.activations
    torch.testing.assert_close(found, direct(spec, some), rtol=1e-4, atol=1e-5)
    assert len({tuple(row.flatten()[:50].tolist()) for row in found}) == 5
    restart()
    assert torch.equal(rows(tmp_path, some, spec), found)


def test_training_is_the_same_on_activations_and_on_pixels(tmp_path):
    net = network("shufflenet_v2_x0_5", "last:1", weights=str(WEIGHTS))
    labels = torch.arange(9) % 3
    plan = Train(rounds=1, local_epochs=3, batch_size=4, optimizer="sgd", lr=0.05)
    results = []
    for keep in ("activations", "images"):
        spec = recipe_of(net, keep)
        worth = keep == "activations"
        prepared, _ = ready(tmp_path, images(9), spec, views=2)
        assert spec.activations == worth
        assert isinstance(prepared.front, nn.Identity) == worth
        assert prepared.rows[torch.tensor([0])].is_floating_point() == worth
        net.load(net.initial)
        data = Examples(prepared, labels)
        loss = trainer.train(net.split.suffix, data, plan, classes=3, lr=plan.lr, seed=5)
        counts = trainer.evaluate(net.split.suffix, data, 3)
        trained = {name: tensor.clone() for name, tensor in net.tensors.items()}
        results.append((loss, trained, counts))
    (loss, cached, counts), (other_loss, computed, other_counts) = results
    assert loss == other_loss
    assert counts.sparse() == other_counts.sparse()
    for name in cached:
        assert torch.equal(cached[name], computed[name])
        assert not torch.equal(cached[name], net.initial[name])


@pytest.mark.parametrize(
    ("backbone", "unfreeze", "activations"),
    [
        ("shufflenet_v2_x0_5", "head", True),
        ("resnet18", "head", True),
        ("resnet18", "last:1", True),
        ("resnet18", "last:4", False),
        ("resnet18", "all", False),
    ],
)
def test_pixels_are_kept_where_activations_take_more_room(
    tmp_path, backbone, unfreeze, activations
):
    net = network(backbone, unfreeze)
    prepared, _ = ready(tmp_path, images(2), recipe_of(net))
    row = prepared.rows[torch.tensor([0, 1])]
    assert (row.dtype == torch.float32) == activations
    assert row[0].nbytes <= 4 * 3 * 64 * 64
    if not activations:
        assert row.dtype == torch.uint8
        assert row.shape == (2, 3, 64, 64)
    logits = net.split.suffix(prepared.front(row)) if unfreeze != "all" else None
    if logits is not None:
        assert logits.shape == (2, 3)


def test_with_everything_unfrozen_the_model_still_gets_normalised_images(tmp_path):
    net = network("resnet18", "all")
    spec, some = recipe_of(net), images(3)
    prepared, _ = ready(tmp_path, some, spec)
    inputs = prepared.front(prepared.rows[torch.arange(3)])
    torch.testing.assert_close(inputs, direct(spec, some))
    assert inputs.dtype == torch.float32


# --- computed once ---


def test_ten_more_images_cost_ten(tmp_path):
    spec, some = counting(), images(40)
    first = rows(tmp_path, some[:30], spec)
    assert spec.prefix.images == 30
    restart()
    spec = counting()
    more = rows(tmp_path, some[30:] + some[:30], spec)
    assert spec.prefix.images == 10
    assert torch.equal(more[10:], first)
    rows(tmp_path, some[5:35:2][::-1], spec)
    assert spec.prefix.images == 10


def test_the_same_image_at_two_sites_costs_one(tmp_path):
    spec, some = counting(), images(6)
    here, there = tmp_path / "here", tmp_path / "there"
    for site in (here, there):
        site.mkdir()
        for i, image in enumerate(some):
            Image.fromarray(image.array).save(site / f"{site.name}-{i}.png")
    first = rows(tmp_path / "cache", [FileImage(p) for p in sorted(here.iterdir())], spec)
    second = rows(tmp_path / "cache", [FileImage(p) for p in sorted(there.iterdir())], spec)
    assert spec.prefix.images == 6
    assert torch.equal(first, second)


def test_an_image_listed_twice_has_two_equal_rows(tmp_path):
    (image,), (other,) = images(1), images(1, start=1)
    spec = counting()
    found = rows(tmp_path, [image, other, image], spec, views=2)
    assert spec.prefix.images == 4  # two images in two views, each once
    assert torch.equal(found[:2], found[4:])
    assert not torch.equal(found[:2], found[2:4])


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path):
    some = images(1100, side=8)
    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path / "a", some, counting(most=700))
    restart()
    spec = counting()
    found = rows(tmp_path / "a", some, spec)
    assert spec.prefix.images == 1100 - 512  # what was in a whole shard is kept
    assert torch.equal(found, rows(tmp_path / "b", some, counting()))


def test_a_refusal_keeps_what_was_computed_and_the_repair_costs_one(tmp_path):
    some, broken = images(9), tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    mixed = [*some[:4], FileImage(broken), *some[4:8]]
    with pytest.raises(DataError):
        ready(tmp_path / "cache", mixed, counting())
    Image.fromarray(some[8].array).save(broken)
    restart()
    spec = counting()
    found = rows(tmp_path / "cache", mixed, spec)
    assert spec.prefix.images == 1
    torch.testing.assert_close(found, direct(spec, [*some[:4], some[8], *some[4:8]]))


def test_another_recipe_has_another_store_and_leaves_the_old_alone(tmp_path):
    some, spec = images(4), counting()
    first = rows(tmp_path, some, spec)
    old = {p: p.read_bytes() for p in tmp_path.rglob("*.safetensors")}
    others = [
        counting(seed=1),
        counting(Preprocess(resize=18, crop=18, mean=SMALL.mean, std=SMALL.std)),
        counting(Preprocess(resize=18, crop=16, mean=SMALL.mean, std=SMALL.std)),
        counting(Preprocess(resize=16, crop=16, mean=(0.4, 0.5, 0.5), std=SMALL.std)),
        counting(Preprocess(16, 16, SMALL.mean, SMALL.std, "bicubic")),
    ]
    for other in others:
        found = rows(tmp_path, some, other)
        assert other.prefix.images == 4
        torch.testing.assert_close(found, direct(other, some))
    assert len({spec.key, *(other.key for other in others)}) == 6
    assert all(path.read_bytes() == data for path, data in old.items())
    restart()
    again = counting()
    assert torch.equal(rows(tmp_path, some, again), first)
    assert again.prefix.images == 0


def test_depth_size_and_weights_each_name_another_store():
    keys = [
        recipe_of(network(*args, **options)).key
        for args, options in [
            (("squeezenet1_1", "head"), {}),
            (("squeezenet1_1", "last:1"), {}),
            (("squeezenet1_1", "last:2"), {}),
            (("squeezenet1_1", "head"), {"size": 96}),
            (("squeezenet1_1", "head"), {"seed": 1}),
            (("shufflenet_v2_x0_5", "head"), {}),
            (("shufflenet_v2_x0_5", "head"), {"weights": str(WEIGHTS)}),
        ]
    ]
    assert len(set(keys)) == len(keys)
    assert recipe_of(network("squeezenet1_1", "head")).key == keys[0]


def test_the_same_tensors_used_in_another_way_name_another_store():
    net = network("resnet18", "head")
    prefixes = [cut_at(net.model, at).prefix for at in ("layer4_1_relu_1", "flatten")]
    assert len({tuple(prefix.state_dict()) for prefix in prefixes}) == 1
    specs = [FeatureSpec(prefix=prefix, preprocess=net.preprocess) for prefix in prefixes]
    assert all(spec.activations for spec in specs)
    assert specs[0].key != specs[1].key


def test_pixels_are_shared_by_all_backbones_of_one_preprocessing():
    resnet, shufflenet = (network(n, "all") for n in ("resnet18", "shufflenet_v2_x0_5"))
    assert recipe_of(resnet).key == recipe_of(shufflenet).key
    assert recipe_of(resnet).key != recipe_of(network("resnet18", "head")).key


def test_training_does_not_make_the_cache_stale():
    net = network("shufflenet_v2_x0_5", "last:1")
    before = recipe_of(net).key
    for tensor in net.tensors.values():
        tensor.add_(1.0)
    after = recipe_of(net).key
    net.load(net.initial)
    assert before == after


def test_rows_depend_on_their_images_alone(tmp_path):
    """Not on who came with them or was there before, nor on how many cores made them."""
    spec, some = recipe_of(network("efficientnet_b0", "head")), images(45, side=70)
    wanted = rows(tmp_path / "1", some, spec)
    for cores in (2, 3):
        restart()
        torch.set_num_threads(cores)
        try:
            rows(tmp_path / f"{cores}", some[::-4], spec)
            assert torch.equal(rows(tmp_path / f"{cores}", some, spec), wanted)
            assert torch.get_num_threads() == cores
        finally:
            torch.set_num_threads(1)


# --- views ---


def pixels_only():
    return FeatureSpec(prefix=nn.Identity(), preprocess=SMALL, activations=False)


def test_views_of_an_image_lie_side_by_side_and_the_first_is_the_image(tmp_path):
    some = images(5)
    prepared, kept = ready(tmp_path, some, pixels_only(), views=4)
    found = prepared.rows[torch.arange(20)].unflatten(0, (5, 4))
    assert (len(prepared.rows), prepared.views, kept) == (20, 4, [0, 1, 2, 3, 4])
    for image, own in zip(some, found, strict=True):
        square = image.square(SMALL)
        assert torch.equal(own[0], square)
        assert len({row.numpy().tobytes() for row in own}) == 4
        # A view is that image, a little changed: nearer to it in its mean than the gain allows.
        for row in own:
            assert row.float().mean() == pytest.approx(square.float().mean().item(), rel=0.2)


def test_views_are_the_same_on_every_machine_and_only_new_ones_cost(tmp_path):
    some, spec = images(5), counting()
    four = rows(tmp_path / "a", some, spec, views=4)
    assert spec.prefix.images == 20
    assert torch.equal(
        four,
        rows(tmp_path / "b", some[::-1], counting(), views=4)
        .unflatten(0, (5, 4))
        .flip(0)
        .flatten(0, 1),
    )
    two = rows(tmp_path / "a", some, spec, views=2)
    plain = rows(tmp_path / "a", some, spec)
    assert spec.prefix.images == 20
    assert torch.equal(two, four.unflatten(0, (5, 4))[:, :2].flatten(0, 1))
    assert torch.equal(plain, four[::4])
    rows(tmp_path / "a", some, spec, views=6)
    assert spec.prefix.images == 30


def test_other_ops_are_other_views_of_the_same_image(tmp_path):
    spec, some = counting(), images(3)
    for ops in (("flip", "crop"), ("rotate",)):
        prepare_images(
            some,
            spec=spec,
            augment=Augment(views=2, ops=ops),
            cache=tmp_path,
            stores=Stores(),
            skip_unreadable=False,
        )
    assert spec.prefix.images == 6 + 3


def test_views_are_not_examples_and_evaluation_sees_the_images_only(tmp_path):
    net = network("shufflenet_v2_x0_5", "head", weights=str(WEIGHTS))
    head = net.model.get_parameter(net.trainable[0])
    nn.init.normal_(head, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0])
    counts = []
    for views in (1, 5):
        prepared, _ = ready(tmp_path, images(4), recipe_of(net), views=views)
        data = Examples(prepared, labels)
        assert len(data) == 4
        counts.append(trainer.evaluate(net.split.suffix, data, 3))
    net.load(net.initial)
    assert counts[0].n == 4
    assert counts[0].sparse() == counts[1].sparse()


# --- unreadable images ---


def unreadable(folder):
    """A file that is no image, one cut short, an empty one, and one that is not there."""
    whole = folder / "whole.png"
    Image.fromarray(images(1, start=99)[0].array).save(whole)
    cut, text, empty = folder / "cut.png", folder / "text.png", folder / "empty.png"
    cut.write_bytes(whole.read_bytes()[:300])
    text.write_bytes(b"hello")
    empty.touch()
    return [FileImage(path) for path in (cut, text, empty, folder / "gone.png")]


def test_unreadable_images_are_named_counted_and_refused(tmp_path):
    good = images(3)
    for i, bad in enumerate(unreadable(tmp_path)):
        with pytest.raises(DataError) as refused:
            ready(tmp_path / f"cache{i}", [good[0], bad, *good[1:]], counting())
        assert "1 of 4 images" in str(refused.value)
        assert bad.name in str(refused.value)
        assert "unreadable: skip" in str(refused.value)
    with pytest.raises(DataError, match=r"4 of 7 images.*; …"):
        ready(tmp_path / "all", unreadable(tmp_path) + good, counting())


@pytest.mark.parametrize("views", [1, 3])
def test_skipping_keeps_rows_beside_their_images(tmp_path, caplog, views):
    good, bad = images(5), unreadable(tmp_path)
    mixed = [bad[0], good[0], good[1], bad[1], bad[3], good[2], good[3], bad[2], good[4]]
    for _ in range(2):  # from nothing, then from the cache
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            prepared, kept = ready(tmp_path / "c", mixed, pixels_only(), views=views, skip=True)
        assert kept == [1, 2, 5, 6, 8]
        assert "4 of 9 images" in caplog.text
        assert len(prepared.rows) == 5 * views
        for row, position in enumerate(kept):
            square = mixed[position].square(SMALL)
            assert torch.equal(prepared.rows[torch.tensor([row * views])][0], square)
        restart()


def test_skipping_everything_leaves_nothing(tmp_path):
    prepared, kept = ready(tmp_path / "c", unreadable(tmp_path), counting(), skip=True)
    assert kept == []
    assert len(prepared.rows) == 0


def test_an_empty_list_is_no_error(tmp_path):
    prepared, kept = ready(tmp_path, [], counting(), views=2)
    assert isinstance(prepared, Prepared)
    assert kept == []
    assert len(prepared.rows) == 0


def test_an_unreadable_image_listed_twice_is_left_out_twice(tmp_path, caplog):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"not an image")
    (good,) = images(1)
    some = [FileImage(tmp_path / "a.png"), good, FileImage(tmp_path / "b.png")]
    prepared, kept = ready(tmp_path / "cache", some, counting(), views=2, skip=True)
    assert (kept, len(prepared.rows)) == ([1], 2)
    assert "2 of 3 images" in caplog.text
    assert "b.png: expected a readable image" in caplog.text


@pytest.mark.parametrize(
    ("views", "told"), [(1, "5 images, once"), (3, "5 images (15 views), once")]
)
def test_the_log_counts_images(tmp_path, caplog, views, told):
    with caplog.at_level(logging.INFO):
        rows(tmp_path, images(5), counting(), views=views)
    assert f"preparing {told}" in caplog.text


# --- whose images they are, it tells nobody ---


def names(cache):
    """The names of all rows in a cache folder."""
    found = set()
    for path in cache.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            found |= set(json.loads(shard.metadata()["names"]))
    return found


def test_a_row_is_named_by_an_image_only_for_who_has_the_secret(tmp_path):
    some = images(3)
    for cache in ("one", "two"):
        ready(tmp_path / cache, some, counting(), views=2)
    one, two = names(tmp_path / "one"), names(tmp_path / "two")
    assert len(one) == len(two) == 6
    assert one.isdisjoint(two)
    secret = (tmp_path / "one" / "secret").read_bytes()
    wanted = {hmac.digest(secret, i.digest().encode(), "sha256").hex() for i in some}
    assert {name.split("/")[0] for name in one} == wanted
    told = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [i for i in some if i.digest().encode() in told]


def test_the_secret_is_drawn_once_and_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        ready(tmp_path, images(2), counting())
    finally:
        os.umask(before)
    secret = tmp_path / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    drawn = secret.read_bytes()
    assert len(drawn) == 32
    assert make_namer(tmp_path)("a") == make_namer(tmp_path)("a") != make_namer(tmp_path)("b")
    assert secret.read_bytes() == drawn
    secret.write_bytes(b"short")
    with pytest.raises(DataError, match=r"secret: expected 32 bytes, got 5 bytes\. Delete it"):
        ready(tmp_path, images(2), counting())


def test_views_are_the_same_in_every_cache(tmp_path):
    """Otherwise a simulation could not be repeated: each cache has a secret of its own."""
    pixels = FeatureSpec(prefix=nn.Identity(), preprocess=SMALL, activations=False)
    one, two = (rows(tmp_path / name, images(3), pixels, views=4) for name in ("one", "two"))
    assert torch.equal(one, two)
    assert len({tuple(row.flatten().tolist()) for row in one}) > 6
