"""Training is the plain recipe it says it is, and touches only what it should."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from client.features.extract import Prepared
from client.features.store import Rows
from client.training import trainer
from client.training.dataset import Examples
from common.config.study import Study, Train
from common.model.network import assemble
from common.model.split import split

pytestmark = pytest.mark.numbers

CLASSES = 3


def examples(inputs, labels, views=1):
    rows = Rows([(inputs, i) for i in range(len(inputs))])
    return Examples(Prepared(rows, views, nn.Identity()), torch.tensor(labels))


def some(n, width=5, seed=0):
    """Random examples, every class in turn."""
    inputs = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return examples(inputs, [i % CLASSES for i in range(n)])


def everything(data):
    return data.batch(torch.arange(len(data)), 0, torch.device("cpu")), data.labels


def linear(width=5, seed=1):
    suffix = nn.Linear(width, CLASSES)
    for p in suffix.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return suffix


class Recorder(nn.Module):
    """A linear suffix that keeps what it was given, and its weights at that time."""

    def __init__(self, width=5, dropout=0.0):
        super().__init__()
        self.linear, self.dropout = linear(width), nn.Dropout(dropout)
        self.batches, self.weights = [], []

    def forward(self, rows):
        self.batches.append(rows.clone())
        self.weights.append(self.linear.weight.detach().clone())
        return self.linear(self.dropout(rows))


def plan(**changes):
    given = {"rounds": 10, "optimizer": "sgd", "momentum": 0.0, "lr": 0.1} | changes
    return Train(**given)


def train(suffix, data, how, *, seed=0, mu=0.0):
    return trainer.train(suffix, data, how, classes=CLASSES, lr=how.lr, seed=seed, proximal_mu=mu)


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- the loss ---

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 1.0, 1.0], [0.0, 4.0, -4.0]])
LABELS = torch.tensor([0, 2, 1, 0])
WEIGHTS = torch.tensor([0.5, 3.0, 1.5])


def test_cross_entropy_is_torchs_own():
    ours = trainer.loss(LOGITS, LABELS, plan(), None)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("imbalance", ["none", "focal"])
def test_an_image_weighs_the_same_whoever_shares_its_batch(imbalance):
    how = plan(imbalance=imbalance)
    alone = [trainer.loss(LOGITS[[i]], LABELS[[i]], how, WEIGHTS) for i in range(4)]
    together = trainer.loss(LOGITS, LABELS, how, WEIGHTS)
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_focal_loss_by_hand(weights):
    each = 0.0
    for row, k in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(row[k]) / sum(math.exp(z) for z in row)
        w = 1.0 if weights is None else weights[k].item()
        each -= w * (1 - p) ** 2 * math.log(p)
    ours = trainer.loss(LOGITS, LABELS, plan(imbalance="focal"), weights)
    assert ours.item() == pytest.approx(each / 4, rel=1e-5)


def test_weighted_gives_present_classes_equal_totals_and_absent_ones_none():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = trainer.class_weights(plan(imbalance="weighted"), labels, 5)
    totals = weights * labels.bincount(minlength=5)
    torch.testing.assert_close(totals, torch.tensor([10 / 3, 10 / 3, 0, 10 / 3, 0]))
    assert weights[[2, 4]].tolist() == [0, 0]


def test_constant_class_weights_do_not_look_at_the_site():
    how = plan(class_weights=(1.0, 2.0, 9.0))
    for labels in ([0, 0, 1], [2]):
        given = trainer.class_weights(how, torch.tensor(labels), CLASSES)
        assert given.tolist() == [1.0, 2.0, 9.0]
    for imbalance in ("none", "focal"):
        assert trainer.class_weights(plan(imbalance=imbalance), torch.tensor([0]), 3) is None


@pytest.mark.parametrize(
    "changes", [{}, {"imbalance": "weighted"}, {"class_weights": (3.0, 1.0, 0.2)}]
)
def test_one_step_follows_the_gradient_of_that_loss(changes):
    data = examples(some(7).prepared.rows[torch.arange(7)], [0, 0, 0, 0, 1, 1, 2])
    weights = {
        (): None,
        ("imbalance",): torch.tensor([7 / 12, 7 / 6, 7 / 3]),
        ("class_weights",): torch.tensor([3.0, 1.0, 0.2]),
    }[tuple(changes)]
    suffix, by_hand = linear(), linear()
    inputs, labels = everything(data)
    each = F.cross_entropy(by_hand(inputs), labels, weight=weights, reduction="none")
    before = each.mean()
    before.backward()
    reported = train(suffix, data, plan(**changes))
    for p, q in zip(suffix.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad)
    assert reported == pytest.approx(before.item(), rel=1e-5)


# --- FedProx ---


def test_fedprox_adds_exactly_mu_times_the_way_from_the_start():
    data, mu, lr = some(6), 2.5, 0.1
    suffix, hand = linear(), linear()
    start = [p.detach().clone() for p in hand.parameters()]
    inputs, labels = everything(data)
    losses = []
    for _ in range(3):
        hand.zero_grad()
        value = F.cross_entropy(hand(inputs), labels)
        value.backward()
        losses.append(value.item())
        with torch.no_grad():
            for w, w0 in zip(hand.parameters(), start, strict=True):
                w -= lr * (w.grad + mu * (w - w0))
    reported = train(suffix, data, plan(local_epochs=3), mu=mu)
    for p, q in zip(suffix.parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert reported == pytest.approx(sum(losses) / 3, rel=1e-5)  # without the proximal term


def test_a_large_mu_holds_the_weights_near_the_start():
    def moved(mu):
        suffix = linear()
        start = suffix.weight.detach().clone()
        train(suffix, some(12), plan(local_epochs=40, lr=0.01), mu=mu)
        return (suffix.weight - start).norm().item()

    assert moved(0.0) > 0.1
    assert moved(90.0) < moved(0.0) / 8


# --- how long a round is ---


@pytest.mark.parametrize(
    ("n", "changes", "sizes"),
    [
        (10, {"batch_size": 4}, [4, 4, 2]),
        (10, {"batch_size": 4, "local_epochs": 2}, [4, 4, 2, 4, 4, 2]),
        (10, {"batch_size": 4, "local_steps": 2}, [4, 4]),
        (10, {"batch_size": 4, "local_steps": 5}, [4, 4, 2, 4, 4]),
        (8, {"batch_size": 4, "local_epochs": 1}, [4, 4]),
        (3, {"batch_size": 32, "local_epochs": 3}, [3, 3, 3]),
        (3, {"batch_size": 32, "local_steps": 4}, [3, 3, 3, 3]),
        (1, {"batch_size": 4, "local_epochs": 2}, [1, 1]),
        (1, {"batch_size": 1, "local_steps": 3}, [1, 1, 1]),
    ],
)
def test_a_round_takes_the_steps_the_study_says(n, changes, sizes):
    suffix = Recorder()
    data = some(n)
    train(suffix, data, plan(**changes))
    assert [len(batch) for batch in suffix.batches] == sizes
    weights = [*suffix.weights, suffix.linear.weight.detach()]
    assert all(not torch.equal(before, after) for before, after in pairwise(weights))
    # Every image comes once before any comes again.
    seen = torch.cat(suffix.batches)
    rows = everything(data)[0]
    order = [(rows == row).all(1).nonzero().item() for row in seen]
    for start in range(0, len(order), n):
        epoch = order[start : start + n]
        assert len(set(epoch)) == len(epoch)


def test_every_epoch_is_a_new_order():
    suffix = Recorder()
    train(suffix, some(20), plan(local_epochs=2))
    first, second = suffix.batches
    assert not torch.equal(first, second)


def test_learning_rate_schedules():
    constant, cosine = plan(lr=0.4), plan(lr=0.4, schedule="cosine", rounds=4)
    assert [trainer.learning_rate(constant, r) for r in (1, 5, 10)] == [0.4] * 3
    rates = [trainer.learning_rate(cosine, r) for r in (1, 2, 3, 4)]
    root = math.sqrt(0.5)
    assert rates == pytest.approx([0.4, 0.2 * (1 + root), 0.2, 0.2 * (1 - root)])
    past = [trainer.learning_rate(Train(rounds=3, lr=1.0, schedule="cosine"), n) for n in (3, 4, 9)]
    assert past == [past[0]] * 3  # a site that fits the model to itself goes on as the study ended
    none = Train(rounds=0, lr=0.1, schedule="cosine")
    assert trainer.learning_rate(none, 1) == 0.1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)],
)
def test_the_studys_optimizer_over_what_trains(name, kind):
    suffix = linear()
    suffix.bias.requires_grad_(False)
    made = trainer.make_optimizer(suffix, plan(optimizer=name, weight_decay=0.3, momentum=0.7), 0.2)
    (group,) = made.param_groups
    assert type(made) is kind
    assert group["params"] == [suffix.weight]
    assert (group["lr"], group["weight_decay"]) == (0.2, 0.3)
    assert group.get("momentum", 0.7) == 0.7


def test_the_optimizer_is_fresh_each_round():
    data, how = some(6), plan(momentum=0.9)
    rounds, steps = linear(), linear()
    for _ in range(3):
        train(rounds, data, how)
    train(steps, data, plan(momentum=0.0, local_epochs=3))
    torch.testing.assert_close(rounds.weight, steps.weight)


# --- randomness ---


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    how = plan(batch_size=4, local_epochs=2)

    def result(seed, noise):
        torch.manual_seed(noise)  # must not matter
        suffix = Recorder(dropout=0.5)
        reported = train(suffix, some(10), how, seed=seed)
        return suffix.linear.weight.detach(), reported

    weight, value = result(7, noise=1)
    again, value_again = result(7, noise=2)
    other, _ = result(8, noise=1)
    assert torch.equal(weight, again)
    assert value == value_again
    assert not torch.equal(weight, other)


def test_dropout_has_a_seed_of_its_own():
    # One full batch: nothing but dropout can differ.
    results = []
    for seed in (1, 2):
        suffix = Recorder(dropout=0.5)
        train(suffix, examples(torch.ones(4, 5), [0, 1, 2, 0]), plan(), seed=seed)
        results.append(suffix.linear.weight.detach())
    assert not torch.equal(*results)


def test_the_global_generator_is_left_alone():
    suffix = Recorder(dropout=0.5)
    data = examples(some(8).prepared.rows[torch.arange(8)], [0, 1, 2, 0], views=2)
    before = torch.get_rng_state()
    train(suffix, data, plan(local_epochs=2))
    trainer.evaluate(suffix, data, CLASSES)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_are_drawn_from_all_of_an_image_and_never_from_another():
    # Row value = 10 · image + view; labels follow the image.
    values = torch.tensor([10.0 * i + v for i in range(6) for v in range(3)])
    data = examples(values[:, None].repeat(1, 5), [i % CLASSES for i in range(6)], views=3)
    suffix = Recorder()
    train(suffix, data, plan(local_epochs=30, batch_size=4))
    seen = torch.cat(suffix.batches)[:, 0]
    assert set(seen.tolist()) == set(values.tolist())
    for epoch in seen.split(6):
        assert sorted((epoch // 10).tolist()) == [0, 1, 2, 3, 4, 5]
    inputs = data.batch(torch.tensor([4, 1]), torch.tensor([2, 0]), torch.device("cpu"))
    assert inputs[:, 0].tolist() == [42.0, 10.0]


# --- what may change ---


def network(backbone, unfreeze):
    return assemble(
        Study(
            name="t",
            classes=("a", "b", "c"),
            model={"backbone": backbone, "weights": "none", "unfreeze": unfreeze},
            images={"size": 64},
            train={"rounds": 1},
        ),
        "none",
    )


@pytest.mark.parametrize("unfreeze", ["head", "last:2", "all"])
@pytest.mark.parametrize("backbone", ["resnet18", "shufflenet_v2_x0_5"])
def test_only_what_is_sent_changes(backbone, unfreeze):
    net = network(backbone, unfreeze)
    model = copy.deepcopy(net.model)
    parts = split(model, net.trainable)
    nn.init.normal_(
        model.get_parameter(net.trainable[-2]), std=0.1, generator=torch.Generator().manual_seed(0)
    )
    before = copies(model)
    images = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = parts.prefix(images)
    data = examples(rows, [0, 1, 2, 0, 1, 2])
    train(parts.suffix, data, plan(optimizer="adam", lr=1e-3, local_epochs=2))
    after = copies(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(net.trainable)
    assert any("running_mean" in name for name in before)
    assert not any(module.training for module in parts.suffix.modules())


# --- evaluation ---


def test_evaluation_counts_every_image_once_and_is_not_random():
    data = some(300)
    suffix = Recorder(dropout=0.9).train()
    counts, again = (trainer.evaluate(suffix, data, CLASSES) for _ in range(2))
    assert counts.n == 300
    assert counts.confusion.sum(1).tolist() == data.labels.bincount().tolist()
    inputs, labels = everything(data)
    logits = suffix.linear(inputs)
    predicted = logits.argmax(1)
    for k in range(CLASSES):
        own = predicted[labels == k].bincount(minlength=CLASSES)
        assert counts.confusion[k].tolist() == own.tolist()
    total = F.cross_entropy(logits, labels, reduction="sum").item()
    assert counts.loss_sum == pytest.approx(total, rel=1e-5)
    assert again.sparse() == counts.sparse()


def test_evaluation_changes_nothing():
    suffix = Recorder()
    before = copies(suffix)
    trainer.evaluate(suffix, some(5), CLASSES)
    assert same(before, copies(suffix))


def test_evaluation_sees_the_image_itself_and_no_other_view():
    rows = some(10).prepared.rows[torch.arange(10)].clone()
    alone = examples(rows[::2], [0, 1, 2, 0, 1])
    rows[1::2] = float("nan")  # counting one of these would raise
    viewed = examples(rows, [0, 1, 2, 0, 1], views=2)
    suffix = linear()
    one, other = (trainer.evaluate(suffix, data, CLASSES) for data in (alone, viewed))
    assert one.n == other.n == 5
    assert one.sparse() == other.sparse()


def test_no_images_give_no_counts():
    nothing = Examples(Prepared(Rows([]), 1, nn.Identity()), torch.empty(0, dtype=torch.int64))
    counts = trainer.evaluate(linear(), nothing, CLASSES)
    assert counts.n == 0
    assert counts.loss_sum == 0.0


def test_examples_of_two_sites_add_up():
    one, other = some(4, seed=1), some(3, seed=2)
    both = one + other
    assert len(both) == 7
    inputs, labels = everything(both)
    assert torch.equal(inputs, torch.cat([everything(one)[0], everything(other)[0]]))
    assert torch.equal(labels, torch.cat([one.labels, other.labels]))


def test_no_batch_is_drawn_before_its_step():
    """A request for a million batches costs nothing until they are trained."""
    batches = trainer._batches(some(1000), plan(local_steps=1_000_000, batch_size=1), seed=0)
    assert [len(next(batches)) for _ in range(3)] == [1, 1, 1]
    assert iter(batches) is batches
