"""The hospital has the last word: it agrees or refuses by name, and holds to what it agreed to."""

import ast
import hashlib
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest

from client.consent.agreement import Agreement
from client.consent.policy import check_policy
from client.privacy.accountant import compute_epsilon
from client.privacy.plan import plan_privacy
from client.site import Site
from common.errors import ContractError, DataError, RefusedError, SiteError
from common.protocol.ledger import LedgerHead
from common.protocol.round import RoundRequest
from common.protocol.tensors import to_arrays
from tests.builders import ROOT, edit_site, make_site, make_study, session_of, write_images

CLASSES = ("dark", "bright")
HEAD = LedgerHead(count=1, hash="0" * 64, receipt="0" * 64)
# Found nowhere by chance.
PATIENT, PICTURE = "DOE_JANE_1970_{}", "scan-of-jane-{}.png"


study = partial(make_study, name="skin", classes=CLASSES, train={"rounds": 3, "batch_size": 4})


def private(epsilon=4.0, delta=1e-6, **changes):
    return study(privacy={"mechanism": "dp_sgd", "epsilon": epsilon, "delta": delta}, **changes)


def model(**keys):
    return study(model=keys)


def train(**keys):
    return study(train={"rounds": 3} | keys)


def write(folder, **keys):
    """A hospital, which may have no images at all."""
    data = {"format": "manifest", "root": "images"}
    return make_site(folder, **{"data": data} | keys)


# --- what it agrees to ---


def refused(site, wanted, patients=100, images=None):
    with pytest.raises(RefusedError) as caught:
        check_policy(site, wanted, None, patients, patients if images is None else images)
    told = str(caught.value)
    assert told.startswith(f"{site.source}: policy.")
    assert ", got " in told
    assert ". Ask the coordinator for " in told
    assert "\n" not in told
    return told


# Policy, a study (and training patients) that is refused, and what the refusal says: the key, what
# this site allows, and what the study has.
REFUSED = {
    "no privacy": (
        {"require_privacy": True, "max_epsilon": 1.0, "delta": 1e-3},
        (study(), 100),
        ["policy.require_privacy: expected", "differential privacy", "got privacy: none"],
    ),
    "no privacy, so no ε": (
        {"max_epsilon": 8.0, "delta": 1e-3},
        (study(), 100),
        ["policy.max_epsilon: expected", "none"],
    ),
    "δ": ({"delta": 1e-7}, (private(), 100), ["δ within 1e-07", "got 1e-06"]),
    "few patients": (
        {"min_patients": 20},
        (study(), 19),
        ["at least 20 training patients, got 19"],
    ),
    "backbone": (
        {"backbones": ["resnet18", "vit_b_16"]},
        (study(), 100),
        ["resnet18, vit_b_16, got shufflenet_v2_x0_5"],
    ),
    "few images": (
        {"min_images": 50},
        (study(), 49),
        ["at least 50 different images without privacy, got 49"],
    ),
    "few images in a round, of many": (
        {"min_images": 50},
        (train(local_steps=7, batch_size=7), 100),
        ["without privacy, got 49"],
    ),
    "held out": (
        {"max_holdout": 0.4},
        (study(holdout={"validation": 0.2, "test": 0.21}), 100),
        ["at most 0.4 of the patients held out, got 0.41"],
    ),
    "no backbone at all": ({"backbones": []}, (study(), 100), ["policy.backbones: expected"]),
    "depth": (
        {"unfreeze": ["head", "last:1"]},
        (model(unfreeze="last:2"), 100),
        ["policy.unfreeze: expected one of head, last:1, got last:2"],
    ),
    "a lower depth": (
        {"unfreeze": ["last:3"]},
        (model(unfreeze="last:2"), 100),
        ["policy.unfreeze: expected one of"],
    ),
    "no depth at all": ({"unfreeze": []}, (study(), 100), ["policy.unfreeze: expected one of"]),
    "epochs": (
        {"max_local_epochs": 2},
        (train(local_epochs=3), 100),
        ["at most 2 epochs, got 12 steps, 3 epochs"],
    ),
    "epochs asked for in steps": (
        {"max_local_epochs": 2},  # an epoch of 100 images is 4 steps of 32
        (train(local_steps=9), 100),
        ["at most 2 epochs, got 9 steps, 2.25 epochs"],
    ),
    "steps": (
        {"max_local_steps": 8},
        (train(local_steps=9), 100),
        ["at most 8 steps, got 9 steps"],
    ),
    "steps asked for in epochs": (
        {"max_local_steps": 7},
        (train(local_epochs=2), 100),
        ["at most 7 steps, got 8 steps, 2 epochs"],
    ),
    "steps of one epoch, asked for in neither": (
        {"max_local_steps": 3},
        (train(), 100),
        ["at most 3 steps, got 4 steps, 1 epochs"],
    ),
    "batches": (
        {"max_batch_size": 31},
        (study(train={"rounds": 1, "batch_size": 32}), 100),
        ["batches of at most 31, got 32"],
    ),
}
# The same policies at a study that just fits.
AGREED = {
    "no rules": ({}, (model(unfreeze="all"), 1)),
    "patients": ({"min_patients": 20}, (study(), 20)),
    "backbone": ({"backbones": ["resnet18", "shufflenet_v2_x0_5"]}, (study(), 1)),
    "depth": ({"unfreeze": ["head", "last:2"]}, (model(unfreeze="last:2"), 1)),
    "epochs": ({"max_local_epochs": 3}, (train(local_epochs=3), 100)),
    "epochs asked for in steps": ({"max_local_epochs": 2}, (train(local_steps=8), 100)),
    "steps": ({"max_local_steps": 9}, (train(local_steps=9), 100)),
    "steps asked for in epochs": ({"max_local_steps": 8}, (train(local_epochs=2), 100)),
    "batches": ({"max_batch_size": 32}, (study(train={"rounds": 1, "batch_size": 32}), 100)),
    "images": ({"min_images": 50}, (train(local_steps=1, batch_size=50), 50)),
    "images of studies without privacy only": ({"min_images": 50}, (private(), 49)),
    "held out": ({"max_holdout": 0.4}, (study(holdout={"validation": 0.15, "test": 0.25}), 100)),
    "a δ of studies with privacy only": ({"delta": 1e-9}, (study(), 1)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_policy_forbids_is_refused_by_its_key(case, tmp_path):
    policy, (wanted, patients), words = REFUSED[case]
    told = refused(write(tmp_path, policy=policy), wanted, patients)
    assert [word for word in words if word not in told] == []


@pytest.mark.parametrize("case", AGREED)
def test_what_the_policy_allows_is_agreed_to(case, tmp_path):
    policy, (wanted, patients) = AGREED[case]
    check_policy(write(tmp_path, policy=policy), wanted, None, patients, patients)


def test_every_rule_of_a_policy_is_tried_here(tmp_path):
    tried = {key for policy, *_ in REFUSED.values() for key in policy}
    assert tried | {"approve", "disclose", "max_studies"} == set(
        write(tmp_path).policy.model_dump()
    )


def test_images_not_patients_make_an_epoch(tmp_path):
    site = write(tmp_path, policy={"max_local_steps": 4})
    check_policy(site, train(local_epochs=1), None, 5, 128)
    assert "got 5 steps, 1 epochs" in refused(site, train(local_epochs=1), 5, 129)


def test_yes_and_no_are_about_one_patient_in_few_sites(tmp_path):
    """A threshold at a multiple told whether there are 20 patients or 19, also with privacy."""
    site = write(tmp_path, policy={"min_patients": 14, "disclose": {"counts": "rounded"}})
    told = []
    for k in range(60):
        (site.private() / "secret").write_bytes(bytes([k]) * 32)
        refused(site, study(), 13)
        check_policy(site, study(), None, 23, 23)
        yes = []
        for patients in range(14, 23):
            try:
                check_policy(site, study(), None, patients, patients)
                yes.append(patients)
            except RefusedError:
                assert not yes  # one step, for good
        told.append(min(yes, default=23))
    assert set(told) == set(range(14, 24))


def test_yes_and_no_tell_nothing_finer_of_images_than_is_told(tmp_path):
    """Who may ask for any batch size and watch the policy say no would count images that way."""
    caps = {"max_local_steps": 3, "disclose": {"counts": "rounded"}}
    capped = write(tmp_path, policy=caps)
    for images in range(1, 60):
        tens, wanted = -(-images // 10), study(train={"rounds": 1, "batch_size": 10})
        if tens <= 3:
            check_policy(capped, wanted, None, images, images)
        else:
            assert f"got {tens} steps" in refused(capped, wanted, images, images)


def test_one_patient_is_enough_where_no_least_is_set(tmp_path):
    for patients in (1, 9, 11):
        check_policy(
            write(tmp_path, policy={"disclose": {"counts": "rounded"}}), study(), None, patients, 20
        )


def test_a_site_that_only_evaluates_keeps_the_rules_that_are_not_of_training(tmp_path):
    caps = {"min_patients": 20, "max_local_steps": 1, "max_local_epochs": 1, "max_batch_size": 1}
    check_policy(write(tmp_path, policy=caps, role="evaluate"), train(local_epochs=9), None, 0, 0)
    for policy, wanted in (
        ({"require_privacy": True, "max_epsilon": 1.0, "delta": 1e-3}, study()),
        ({"backbones": ["resnet18"]}, study()),
        ({"unfreeze": ["head"]}, model(unfreeze="all")),
    ):
        refused(write(tmp_path, policy=policy, role="evaluate"), wanted, 0)


def test_the_length_of_private_rounds_is_what_will_run_whoever_trains(tmp_path):
    """From `enrolled_patients`, not from images: who asks again and again counts nobody."""
    data = {"format": "manifest", "root": "images", "enrolled_patients": 1000}
    wanted = private(train={"rounds": 3, "local_epochs": 2, "batch_size": 64})
    for policy, said in (
        ({"max_local_steps": 31}, "at most 31 steps, got 32 steps, 2.048 epochs"),
        ({"max_local_epochs": 2}, "at most 2 epochs, got 32 steps"),
        ({"max_batch_size": 63}, "at most 63, got 64"),
    ):
        site = write(tmp_path, data=data, policy=policy)
        privacy_plan = plan_privacy(site, wanted, wanted.privacy)
        for images in (1, 100_000):
            with pytest.raises(RefusedError, match=re.escape(said)):
                check_policy(site, wanted, privacy_plan, 1, images)
    site = write(tmp_path, data=data, policy={"max_local_steps": 32, "max_batch_size": 64})
    check_policy(site, wanted, plan_privacy(site, wanted, wanted.privacy), 1, 100_000)
    whole = private(train={"rounds": 3, "local_steps": 1, "batch_size": 65_536})
    site = write(tmp_path, data=data, policy={"max_batch_size": 1000})
    check_policy(site, whole, plan_privacy(site, whole, whole.privacy), 1, 100_000)


def test_epsilon_is_limited_at_the_delta_of_the_policy(tmp_path):
    """ε = 4 at a smaller δ is less at the site's own, by which its ledger and plan count, too."""
    data = {"format": "manifest", "root": "images", "enrolled_patients": 100}
    wanted = private(4.0, 1e-9)
    for most, allowed in ((2.0, True), (1.0, False)):
        site = write(tmp_path, data=data, policy={"max_epsilon": most, "delta": 1e-4})
        privacy_plan = plan_privacy(site, wanted, wanted.privacy)
        if allowed:
            check_policy(site, wanted, privacy_plan, 1, 1)
            continue
        found = compute_epsilon(privacy_plan.whole, 1e-4)
        said = re.escape(f"policy.max_epsilon: expected ε within 1 at δ = 0.0001, got {found:.4g}")
        with pytest.raises(RefusedError, match=said):
            check_policy(site, wanted, privacy_plan, 1, 1)


@pytest.mark.parametrize(("delta", "allowed"), [(1e-4, True), (1.001e-4, False), (1e-3, False)])
def test_a_delta_that_protects_few_is_refused(tmp_path, delta, allowed):
    """At δ = 1 / n a mechanism may tell one patient whole; n is what the hospital declares."""
    data = {"format": "manifest", "root": "images", "enrolled_patients": 1000}
    site, wanted = write(tmp_path, data=data), private(delta=delta)
    privacy_plan = plan_privacy(site, wanted, wanted.privacy)
    for patients in (1, 10**6):
        if allowed:
            check_policy(site, wanted, privacy_plan, patients, patients)
        else:
            with pytest.raises(
                RefusedError, match=r"at most 0\.0001, a tenth.*got.*privacy\.delta"
            ):
                check_policy(site, wanted, privacy_plan, patients, patients)


def test_what_a_policy_leaves_out_is_nothing_open(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("{name: ward, data: {format: manifest, root: .}, state: state}")
    site = Site.read(path)
    assert site.policy.approve == "ask"
    assert site.policy.max_studies == 4
    refused(site, study(), 49)
    refused(site, study(holdout={"validation": 0.3, "test": 0.3}))
    check_policy(site, study(), None, 50, 50)


def test_every_refusal_has_a_remedy():
    """Whoever writes `RefusedError(...)` says what to do; one that repeats a whole text has it."""
    for path in sorted((ROOT / "client").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(getattr(call, "func", None), "id", "")
            if isinstance(call, ast.Call) and name in {"RefusedError", "BudgetError"}:
                given = {keyword.arg for keyword in call.keywords}
                assert not given or "remedy" in given, f"{path}:{call.lineno}"


# --- what it agreed to, it holds to ---


def hospital(folder, patients=12, **keys):
    """Every part has patients of each class; the manifest says who is in which."""
    splits = ("train", "validation", "test")
    write_images(
        folder / "images",
        [
            (PICTURE.format(i), CLASSES[i % 2], PATIENT.format(i), splits[i % 3])
            for i in range(patients)
        ],
    )
    return write(folder, **keys)


def edit(site, **keys):
    """The same hospital with other keys in its site file."""
    return Site.read(edit_site(Path(site.source), **keys))


def rows(site, change):
    """Change the manifest's rows."""
    path = site.data.root / "manifest.csv"
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([first, *change(lines)]) + "\n")


def join(site, wanted=None):
    """Joins, as a process of its own would; what was told."""
    return session_of(site, wanted or study()).join(HEAD, [])


def work(site, number=1):
    """A round, as a process of its own would."""
    session = session_of(site, study())
    initial = session.prepared.network.initial
    arrays = to_arrays(initial)
    request = RoundRequest(study=study().id, round=number, proximal_mu=0.0, arrays=arrays)
    return session.work(request, initial, HEAD)


def finish(site):
    session = session_of(site, study())
    return session.finish(session.prepared.network.initial)


def on_disk(site):
    return site.state / "studies" / f"{study().id}.agreement.json"


def test_what_was_agreed_is_on_disk_and_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        site = hospital(tmp_path, policy={"disclose": {"counts": "rounded", "metrics": "final"}})
        assert Agreement.kept(site, study().id) is None
        told = join(site)
    finally:
        os.umask(before)
    assert on_disk(site).stat().st_mode & 0o777 == 0o600
    kept = Agreement.kept(site, study().id)
    assert kept is not None
    assert (kept.study, kept.role, kept.privacy_plan) == (study().id, "train", None)
    assert kept.disclosure == told.disclosure
    # The site itself knows the exact numbers; what it told is coarse.
    assert (kept.patients.all, kept.images.all) == ((4, 4, 4), ((2, 2),) * 3)
    numbers = [*told.patients.all, *(n for images in told.images.all for n in images)]
    assert set(numbers) <= {0, 10}
    assert len(kept.records) == 12
    assert Agreement.kept(site, "0" * 16) is None


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_agreement_is_named_and_nothing_is_made_up(content, tmp_path):
    site = hospital(tmp_path)
    join(site)
    on_disk(site).write_bytes(content)
    for use in (lambda: Agreement.kept(site, study().id), lambda: join(site), lambda: work(site)):
        with pytest.raises(SiteError, match=r"agreement\.json: expected an agreement.*Restore it"):
            use()
    assert on_disk(site).read_bytes() == content


def test_a_cut_or_longer_agreement_is_damaged_too(tmp_path):
    site = hospital(tmp_path)
    join(site)
    whole = on_disk(site).read_bytes()
    longer = whole.rstrip()[:-1] + b', "patient": "p1"}'
    for content in (whole[:-9], longer, whole.replace(b'"train"', b'"server"', 1)):
        on_disk(site).write_bytes(content)
        with pytest.raises(SiteError, match="expected an agreement as written"):
            Agreement.kept(site, study().id)


def test_no_id_of_a_patient_or_image_stands_in_it(tmp_path):
    sites = [hospital(tmp_path / name) for name in ("one", "two")]
    for site in sites:
        join(site)
    texts = [on_disk(site).read_text() for site in sites]
    for i in range(12):
        for word in (PATIENT.format(i), PICTURE.format(i)):
            assert all(word not in text for text in texts)
            assert hashlib.sha256(word.encode()).hexdigest()[:16] not in texts[0]
        image = (sites[0].data.root / PICTURE.format(i)).read_bytes()
        assert hashlib.sha256(image).hexdigest()[:16] not in texts[0]
    # The same patients under another secret: nobody can tell that they are the same.
    records = [set(Agreement.kept(site, study().id).records) for site in sites]
    assert len(records[0]) == len(records[1]) == 12
    assert not records[0] & records[1]


def test_a_site_that_gained_patients_goes_on_with_those_it_joined_with(tmp_path):
    site = hospital(tmp_path)
    before = join(site)
    first = work(site)
    hospital(tmp_path, patients=30)  # the same twelve, and others
    assert session_of(site, study()).prepared.offer.patients.model_dump() == {
        "train": 4,
        "validation": 4,
        "test": 4,
    }
    again = work(site)
    assert again.figures.train_loss == first.figures.train_loss
    assert again.figures.counts.sparse() == first.figures.counts.sparse()
    assert all(again.arrays[name].data == first.arrays[name].data for name in first.arrays)
    assert join(site) == before  # nor does joining again let them in
    assert join(site, study(name="other")).patients.all == (10, 10, 10)


def test_a_site_that_lost_a_patient_is_refused_until_it_joins_again(tmp_path):
    site = hospital(tmp_path)
    join(site)
    rows(site, lambda lines: [line for line in lines if PATIENT.format(3) not in line])
    for use in (work, finish):
        with pytest.raises(DataError, match=r"site\.yaml: data: expected the patients.*fewer"):
            use(site)
    again = join(site)
    assert again.patients.all == (3, 4, 4)
    assert again.images.train == (2, 1)
    assert work(site).figures is not None
    # Who comes back was there at first.
    hospital(tmp_path)
    with pytest.raises(DataError):
        work(site)
    assert join(site).patients.all == (4, 4, 4)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_one_of_any_part_is_missed_also_if_another_came(part, tmp_path):
    site = hospital(tmp_path)
    join(site)
    gone = PATIENT.format(("train", "validation", "test").index(part))

    def swap(lines):
        return [line.replace(gone, "somebody") for line in lines]

    rows(site, swap)
    with pytest.raises(DataError, match="the patients that it joined with"):
        work(site)


def test_who_changed_label_or_part_is_not_who_joined(tmp_path):
    for name, old, new in (("label", "dark", "bright"), ("part", "validation", "train")):
        site = hospital(tmp_path / name)
        join(site)
        rows(site, lambda lines, old=old, new=new: [x.replace(old, new) for x in lines])
        with pytest.raises(DataError):
            work(site)


def test_the_same_data_mounted_elsewhere_are_the_same_patients(tmp_path):
    site = hospital(tmp_path)
    before = join(site)
    shutil.move(tmp_path / "images", tmp_path / "mounted")
    moved = edit(site, data={"format": "manifest", "root": "mounted"})
    assert work(moved).figures is not None
    assert join(moved) == before


def test_a_policy_that_tells_less_than_agreed_refuses_until_it_joins_again(tmp_path):
    site = hospital(tmp_path)
    assert join(site).disclosure.metrics == "every_round"
    for disclose in ({"metrics": "final"}, {"counts": "rounded"}, {"min_cell": 3}):
        less = edit(site, policy={"disclose": disclose})
        for use in (work, finish):
            with pytest.raises(RefusedError, match=r"site\.yaml: policy\.disclose: expected what"):
                use(less)
    less = edit(site, policy={"disclose": {"counts": "none"}})
    told = join(less)
    assert told.disclosure.counts == "none"
    assert told.patients.all == told.images.all == (None, None, None)
    assert work(less).figures is None
    assert finish(less).counts is None


def test_a_policy_that_tells_more_changes_nothing_that_was_agreed(tmp_path):
    agreed = {"counts": "rounded", "metrics": "final", "min_cell": 12}
    site = hospital(tmp_path, policy={"disclose": agreed})
    join(site)
    more = edit(site, policy={"disclose": {"counts": "exact"}})
    assert work(more).figures is None
    counts = finish(more).counts
    for told in (counts.validation, counts.test):
        assert (told.confusion % 12 == 0).all()
        assert not told.positive.any()


def test_a_rule_that_came_later_is_kept_from_then_on(tmp_path):
    site = hospital(tmp_path)
    join(site)
    for policy in ({"max_epsilon": 1.0, "delta": 1e-3}, {"min_patients": 5}, {"backbones": []}):
        with pytest.raises(RefusedError):
            work(edit(site, policy=policy))
    assert work(edit(site, policy={})).figures is not None


def test_another_role_is_another_agreement(tmp_path):
    site = hospital(tmp_path)
    join(site)
    with pytest.raises(DataError, match="another role"):
        finish(edit(site, role="evaluate"))


def test_who_has_not_joined_does_nothing(tmp_path):
    site = hospital(tmp_path)
    for use in (work, finish):
        with pytest.raises(ContractError, match="has not joined"):
            use(site)
    assert not on_disk(site).exists()
