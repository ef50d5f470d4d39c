"""Pictures of a page: their text is text, their names are apart, and they are small."""

import re
from collections.abc import Sequence

import torch

from common.metrics.counts import Counts
from common.metrics.metrics import class_auroc
from common.metrics.statistics import Estimate
from common.page.blocks import Figure
from common.page.plots_of_counts import (
    plot_confusion,
    plot_decision_curves,
    plot_reliability,
    plot_roc,
)
from common.page.plots_of_rounds import Row, plot_learning
from common.page.plots_of_sites import (
    plot_cross_sites,
    plot_differences,
    plot_estimates,
    plot_seeds,
)

HOSTILE = ["$\\frac{1}{", "_hidden", '<script>alert(1)</script>" id="x', "--> url(#a", "a\nb"]
METRIC = "balanced_accuracy"


def list_rounds(sites: Sequence[str], rounds: int) -> list[Row]:
    return [
        {"round": r, "model_round": r - 1, "site": site, "loss": 1 / r, METRIC: 1 - 1 / r}
        for site in (None, *sites)
        for r in range(1, rounds + 1)
    ]


def count_images(classes: int, images: int = 200) -> Counts:
    dice = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, classes, generator=dice)
    logits[range(images), labels] += 1
    return Counts.of(logits, labels)


def draw_counts(classes: Sequence[str]) -> list[Figure]:
    counts = count_images(len(classes))
    figures = [
        plot_roc(counts, classes, "all"),
        plot_reliability(counts, classes, "all", seed=0),
        plot_confusion(counts, classes, "all"),
        plot_decision_curves(counts, classes, "all"),
    ]
    return [figure for figure in figures if figure]


def draw_all(names: Sequence[str], rounds: int = 3) -> list[Figure]:
    """A picture of each kind, of sites and classes with any names."""
    figures = draw_sites(names, rounds) + draw_counts(names)
    assert len(figures) == 9
    return figures


def draw_sites(sites: Sequence[str], rounds: int = 3) -> list[Figure]:
    estimates = {site: Estimate(0.6 + i / 100, 0.5, 0.8) for i, site in enumerate(sites)}
    ways = ("local", "fedavg", "solved", "federated", "adapted", "pooled")
    figures = [
        plot_differences(list(estimates.items()), METRIC, ("federated", "local"), "all"),
        plot_estimates(
            dict.fromkeys(ways, {None: Estimate(0.6, 0.5, 0.7)} | estimates), METRIC, "all"
        ),
        plot_seeds({"local": {site: [0.5, None, 0.7] for site in sites}}, METRIC, "seeds"),
        plot_cross_sites({a: {b: 0.123 for b in sites if a != b} for a in sites}, METRIC, "all"),
        plot_learning(list_rounds(sites, rounds), METRIC, "all"),
    ]
    return [figure for figure in figures if figure]


def test_names_stay_text_whatever_they_are() -> None:
    shown = ["$\\frac{1}{", "_hidden", "--&gt; url(#a", "a\N{REPLACEMENT CHARACTER}b"]
    for figure in draw_all(HOSTILE):
        tags = re.findall(r"<[^>]*>", figure.svg)
        assert not any("script" in tag or "alert" in tag for tag in tags)
        for name in shown:
            assert f">{name}" in figure.svg, (figure.title, name)


def test_of_hundreds_of_classes_there_are_tables_alone() -> None:
    assert len(draw_counts([f"class {k}" for k in range(40)])) == 4
    assert draw_counts([f"class {k}" for k in range(41)]) == []


def test_names_inside_pictures_differ_and_are_found() -> None:
    figures = draw_all(["north", "south"])
    names = [re.findall(r'\bid="([^"]*)"', figure.svg) for figure in figures]
    assert len({name for own in names for name in own}) == sum(map(len, names)) > 0
    for figure, own in zip(figures, names, strict=True):
        used = re.findall(r'(?:url\(#|href="#)([^)"]*)', figure.svg)
        assert set(used) <= set(own), figure.title


def test_the_same_figures_give_the_same_bytes() -> None:
    assert draw_all(["north", "south"]) == draw_all(["north", "south"])


def test_a_picture_loads_nothing_and_sets_no_style_for_others() -> None:
    for figure in draw_all(["north", "south"]):
        assert "http" not in figure.svg
        assert "font-family" not in figure.svg
        assert "<style" not in figure.svg
        assert "<image" not in figure.svg


def test_pictures_of_twenty_sites_and_a_hundred_rounds_are_small() -> None:
    figures = draw_sites([f"university_hospital_{number}" for number in range(20)], rounds=100)
    figures += draw_counts(["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"])
    assert sum(len(figure.svg) for figure in figures) < 500_000


def test_a_line_of_many_rounds_has_few_points() -> None:
    short, long = (plot_learning(list_rounds([], n), METRIC, "all") for n in (300, 3000))
    assert short
    assert long
    assert len(long.svg) < 1.2 * len(short.svg)


def test_nothing_to_show_is_no_picture() -> None:
    row = {"round": 1, "model_round": 0, "site": None, "loss": None, METRIC: None}
    assert plot_differences([("north", None)], METRIC, ("a", "b"), "all") is None
    assert plot_estimates({"local": {"north": None}}, METRIC, "all") is None
    assert plot_seeds({"local": {"north": [None]}}, METRIC, "all") is None
    assert plot_cross_sites({"north": {"north": None}}, METRIC, "all") is None
    assert plot_learning([row], METRIC, "all") is None
    assert plot_confusion(Counts.zero(3), "abc", "all") is None


def test_without_scores_there_are_no_pictures_of_them() -> None:
    exact = count_images(3)
    counts = exact.coarse(exact.confusion, 5.0)
    assert plot_roc(counts, "abc", "all") is None
    assert plot_reliability(counts, "abc", "all", seed=0) is None
    assert plot_decision_curves(counts, "abc", "all") is None
    confusion = plot_confusion(counts, "abc", "all")
    assert confusion
    assert "right within about 5" in confusion.caption


def test_a_class_without_images_is_left_out_of_the_curves() -> None:
    counts = Counts.of(torch.eye(3)[[0, 1, 0, 1]], torch.tensor([0, 1, 1, 0]))
    for plot in (plot_roc, plot_decision_curves):
        figure = plot(counts, ["north", "south", "nobody"], "all")
        assert figure
        assert "north" in figure.svg
        assert "nobody" not in figure.svg


def test_titles_and_legends_tell_images_and_areas() -> None:
    counts = count_images(2)
    roc = plot_roc(counts, ["no", "yes"], "federated model")
    assert roc
    assert roc.title == "ROC curves: federated model, 200 images"
    area = class_auroc(counts, 1)
    assert area
    assert f">yes {area:.2f}".replace("0.", ".") + " (100)<" in roc.svg
    assert ">no " not in roc.svg  # two classes share one curve


def test_a_withheld_figure_is_a_dash_that_the_caption_explains() -> None:
    rows = [("north", Estimate(0.1, 0.05, 0.2)), ("south", None)]
    figure = plot_differences(rows, METRIC, ("federated", "local"), "all")
    assert figure
    assert ">–<" in figure.svg
    assert "–: withheld" in figure.caption


def test_the_better_side_is_named_also_where_less_is_better() -> None:
    rows = [("north", Estimate(0.1, 0.05, 0.2))]
    for metric, side in (("auroc", "Right"), ("loss", "Left")):
        figure = plot_differences(rows, metric, ("federated", "local"), "all")
        assert figure
        assert figure.caption.startswith(f"{side} of 0 federated is better.")
