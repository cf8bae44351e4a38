"""The metric against closed forms, torchmetrics, brute force, and sets built so that the answer is
known.
"""

import dataclasses
import json
import math

import pytest
import torch
from networks import as_network
from torch import nn

from ddpm_utils import data, evaluation, pretrained, runtime
from ddpm_utils.diffusion import Denoiser
from ddpm_utils.evaluation import (
    Classifier,
    bits_per_dimension,
    class_histogram,
    class_probabilities,
    compare,
    coverage,
    discretized_log_likelihood,
    extract_features,
    frechet_distance,
    gaussian_kl,
    kernel_distance,
    memorization,
    nearest_neighbors,
    precision_recall,
    prior_term,
    train_classifier,
    weighted_timesteps,
)
from ddpm_utils.oracle import GaussianDenoiser
from ddpm_utils.schedules import NoiseSchedule, linear_betas, make_schedule

REAL = runtime.data_dir_override() or runtime.data_dir()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(
    n,
    d,
    seed=0,
    mean=0.0,
    std=1.0,
):
    return mean + std * torch.randn(n, d, generator=rng(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def digits():
    return data.load_images("digits", say=False), data.load_images("digits", "test", say=False)


@pytest.fixture(scope="module")
def classifier(digits):
    """A classifier of the digits, trained for a second: enough to have dead features like the
    shipped ones.
    """
    return train_classifier(digits[0].images, digits[0].labels, epochs=2)


@pytest.fixture(scope="module")
def features(digits, classifier):
    return tuple(extract_features(classifier, part.images) for part in digits)


# The classifier


@pytest.mark.parametrize(("dataset", "bar"), [("fashion_mnist", 0.91), ("mnist", 0.99)])
def test_the_shipped_classifiers_are_right_as_often_as_promised(monkeypatch, dataset, bar):
    raw = data.raw_folder(dataset, REAL)
    if not all((raw / file).is_file() for file in data.FILES["test"]):
        pytest.skip(f"{data.TITLES[dataset]} is not on disk")
    monkeypatch.setenv("DDPM_DATA_DIR", str(REAL))
    test_set = data.load_images(dataset, "test", say=False)
    model = pretrained.load_classifier(dataset)
    right = (
        class_probabilities(model, extract_features(model, test_set.images)).argmax(dim=1)
        == test_set.labels
    )
    accuracy = right.double().mean().item()
    assert accuracy >= bar
    assert accuracy == pytest.approx(
        pretrained.card(f"classifier_{dataset}")["test_accuracy"], abs=5e-4
    )


def test_features_and_probabilities_are_those_of_the_network(digits, classifier):
    images = digits[1].images[:30]
    x = images / 127.5 - 1
    with torch.no_grad():
        expected, logits = classifier.features(x), classifier(x)
    found = extract_features(classifier, images, batch_size=7)
    assert found.dtype == torch.float64 and found.shape == (30, 96)
    torch.testing.assert_close(found.float(), expected)
    torch.testing.assert_close(
        class_probabilities(classifier, found).float(), logits.softmax(dim=1)
    )


def test_features_are_taken_in_eval_mode_and_the_mode_comes_back(digits):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = extract_features(model, digits[1].images[:1])
    all_ = extract_features(model, digits[1].images[:20])
    torch.testing.assert_close(one, all_[:1])
    assert model.training and all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )


def test_training_depends_on_the_seed_alone(digits):
    images, labels = digits[0].images[:200], digits[0].labels[:200]
    state = torch.get_rng_state()
    one, two, other = (
        train_classifier(images, labels, epochs=1, batch_size=64, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    equal = [
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    ]
    assert all(equal) and not torch.equal(one.squeeze.weight, other.squeeze.weight)
    assert one.convs[1].num_batches_tracked == 3, "an epoch is every whole batch once"


def test_training_sees_images_moved_by_up_to_shift_pixels_with_black_coming_in(digits, monkeypatch):
    seen = []
    forward = Classifier.forward
    monkeypatch.setattr(
        Classifier, "forward", lambda self, x: seen.append(x.clone()) or forward(self, x)
    )
    images = torch.full((8, 1, 28, 28), 255, dtype=torch.uint8)
    train_classifier(images, torch.arange(8), epochs=60, shift=2, batch_size=8)
    assert all(x.shape == (8, 1, 28, 28) for x in seen)
    for bars in (
        [x[0, 0, :, 14] for x in seen],
        [x[0, 0, 14] for x in seen],
    ):  # black rows on top less those below; columns
        assert {int((bar[:2] < 0).sum() - (bar[-2:] < 0).sum()) for bar in bars} == {
            -2,
            -1,
            0,
            1,
            2,
        }
    assert all(x.unique().tolist() in ([1.0], [-1.0, 1.0]) for x in seen)


def test_training_works_on_fewer_images_than_a_batch_and_on_color():
    images = torch.randint(0, 256, (5, 3, 20, 24), generator=rng(), dtype=torch.uint8)
    model = train_classifier(images, torch.tensor([0, 1, 2, 0, 1]), num_classes=3, epochs=2)
    assert extract_features(model, images).shape == (5, 96)
    assert class_probabilities(model, extract_features(model, images)).shape == (5, 3)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.arange(3), r"shape \(4,\).*got shape \(3,\)"),
        (torch.tensor([0, 1, 2, 3]), "0 … 2.*3"),
        (torch.tensor([0, -1, 2, 1]), "-1"),
    ],
)
def test_training_refuses_labels_that_do_not_fit(labels, words):
    with pytest.raises(ValueError, match=words):
        train_classifier(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), labels, num_classes=3)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 28, 28),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
        torch.zeros(0, 1, 28, 28, dtype=torch.uint8),
    ],
)
def test_images_of_another_kind_are_refused(classifier, images):
    schedule = make_schedule("cosine", 10)
    for call in (
        lambda: extract_features(classifier, images),
        lambda: train_classifier(images, torch.zeros(2).long()),
        lambda: bits_per_dimension(None, schedule, images),
    ):
        with pytest.raises(ValueError, match="in uint8: data.to_image_range"):
            call()


def test_class_histogram_counts():
    found = class_histogram(torch.tensor([3, 0, 3, 3]), 5)
    assert found.tolist() == [0.25, 0, 0, 0.75, 0]
    for bad in (torch.tensor([5]), torch.tensor([-1]), torch.tensor([0.5])):
        with pytest.raises(ValueError, match="0 … 4"):
            class_histogram(bad, 5)


# Fréchet distance


def torchmetrics_fid(a, b):
    """torchmetrics' whole metric with features in place of images."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = nn.Identity()
    extractor.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=extractor).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute().item()


def exactly(n, mean, cov_diagonal, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), seed)
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x * torch.tensor(cov_diagonal, dtype=torch.float64).sqrt() + torch.tensor(
        mean, dtype=torch.float64
    )


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form():
    mean_a = [1.0, -2.0, 0.5]
    mean_b = [0.0, 1.0, 0.5]
    var_a = [4.0, 1.0, 0.25]
    var_b = [1.0, 9.0, 0.25]
    found = frechet_distance(exactly(50, mean_a, var_a), exactly(70, mean_b, var_b, seed=1))
    expected = sum((p - q) ** 2 for p, q in zip(mean_a, mean_b, strict=True))
    expected += sum((p**0.5 - q**0.5) ** 2 for p, q in zip(var_a, var_b, strict=True))
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_does_not_see_a_common_rotation_or_shift():
    a, b = normal(200, 6), normal(150, 6, 1, 0.5, 2.0)
    turn = torch.linalg.qr(normal(6, 6, 2)).Q
    assert frechet_distance(a @ turn + 3, b @ turn + 3) == pytest.approx(
        frechet_distance(a, b), rel=1e-9
    )
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a + 3, a) == pytest.approx(54, rel=1e-9)


@pytest.mark.parametrize("d", [2, 16, 96])
def test_frechet_distance_agrees_with_torchmetrics_on_full_rank_features(d):
    a, b = normal(400, d) @ normal(d, d, 5), 0.3 + normal(300, d, 1) @ normal(d, d, 6)
    assert frechet_distance(a, b) == pytest.approx(torchmetrics_fid(a, b), rel=1e-6)


def test_frechet_distance_agrees_with_torchmetrics_on_features_of_a_classifier(features):
    train, test = features
    assert (train.std(dim=0) == 0).any() or torch.linalg.matrix_rank(torch.cov(train.T)) < 96, (
        "no longer singular"
    )
    for a, b in ((test, train), (train[:750], train[750:]), (train[:60], test)):
        assert frechet_distance(a, b) == pytest.approx(torchmetrics_fid(a, b), rel=1e-3)


def test_frechet_distance_of_a_set_to_itself_is_0(features):
    for x in (*features, normal(40, 96), normal(300, 8).float()):
        assert abs(frechet_distance(x, x)) < 1e-5 * torch.cov(x.T).trace()


def test_frechet_distance_computes_in_float64():
    # means that leave float32 two digits
    a, b = normal(500, 8, 0, 1000.0, 0.1), normal(500, 8, 1, 1000.0, 0.1)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=0.02)


# Kernel distance


def test_kernel_distance_is_the_double_loop_and_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b = normal(7, 3), normal(5, 3, 1, 0.4)

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / 3 + 1) ** 3

    def within(x):
        pairs = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(pairs) / len(pairs)

    expected = within(a) + within(b) - 2 * sum(kernel(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    a, b = normal(60, 20), normal(60, 20, 1, 0.4)
    assert kernel_distance(a, b) == pytest.approx(poly_mmd(a, b).item(), rel=1e-9)


def test_kernel_distance_of_sets_longer_than_a_part_is_that_of_the_whole_matrix():
    a, b = normal(2500, 4), normal(1001, 4, 1, 0.4)

    def mean(x, y):
        return ((x @ y.T / 4 + 1) ** 3).mean().item()

    def within(x):
        n, own = len(x), ((x.square().sum(1) / 4 + 1) ** 3).mean().item()
        return (n * mean(x, x) - own) / (n - 1)

    expected = within(a) + within(b) - 2 * mean(a, b)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_at_any_size():
    """200 pairs of sets from one distribution: 0 on average, whatever their sizes."""
    for n in (3, 60):
        pairs = [kernel_distance(normal(n, 4, 2 * i), normal(80, 4, 2 * i + 1)) for i in range(200)]
        values = torch.tensor(pairs, dtype=torch.float64)
        assert abs(values.mean()) < 4 * values.std() / 200**0.5
        assert (values < 0).any() and (values > 0).any()


def test_kernel_distance_of_different_distributions_is_the_true_discrepancy():
    """In one dimension k expands into moments: the discrepancy is Σ binom(3, j) (E xʲ − E yʲ)²."""
    moments = [(1, 0.0, 0.5), (2, 1.0, 1.25), (3, 0.0, 3 * 0.5 + 0.125)]
    true = sum(math.comb(3, j) * (p - q) ** 2 for j, p, q in moments)
    pairs = [(normal(1000, 1, 2 * i), normal(1000, 1, 2 * i + 1, 0.5)) for i in range(40)]
    values = torch.tensor([kernel_distance(a, b) for a, b in pairs], dtype=torch.float64)
    error = values.std().item() / 40**0.5
    assert abs(values.mean().item() - true) < 4 * error < 0.5 * true


# Precision, recall, coverage


def test_precision_and_recall_are_0_where_nothing_meets_and_1_on_the_same_set():
    real = normal(50, 4)
    assert precision_recall(real, real + 1000) == (0.0, 0.0) and coverage(real, real + 1000) == 0.0
    assert (
        precision_recall(real, real.clone()) == (1.0, 1.0) and coverage(real, real.clone()) == 1.0
    )


def test_a_lost_mode_lowers_recall_and_coverage_and_an_invented_one_precision():
    """Two far clusters, one of which the fakes never show; then a third
    that no real image is in.
    """
    real = torch.cat([normal(300, 3), normal(300, 3, 1, 100.0)])
    half = normal(600, 3, 2)
    precision, recall = precision_recall(real, half)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.03)
    assert coverage(real, half) == pytest.approx(0.5, abs=0.03)
    invented = torch.cat([normal(150, 3, 3), normal(150, 3, 4, 100.0), normal(300, 3, 5, -100.0)])
    precision, recall = precision_recall(real, invented)
    assert precision == pytest.approx(0.5, abs=0.05) and recall > 0.9


def test_precision_recall_and_coverage_are_the_brute_force_count():
    real, fake, k = normal(40, 2), normal(30, 2, 1, 0.8), 3

    def distance(x, y):
        return math.dist(x.tolist(), y.tolist())

    def radius(x, points, k):
        return sorted(distance(x, y) for y in points if y is not x)[k - 1]

    reals, fakes = list(real), list(fake)
    precision = sum(any(distance(f, r) <= radius(r, reals, k) for r in reals) for f in fakes) / 30
    recall = sum(any(distance(r, f) <= radius(f, fakes, k) for f in fakes) for r in reals) / 40
    covered = sum(min(distance(r, f) for f in fakes) <= radius(r, reals, 2) for r in reals) / 40
    assert len({0, 1, precision, recall, covered}) == 5, "no test of the difference"
    assert precision_recall(real, fake, k) == pytest.approx((precision, recall))
    assert coverage(real, fake, k=2) == pytest.approx(covered)


def test_one_odd_sample_buys_recall_but_no_coverage():
    real = normal(200, 2)
    fake = torch.cat(
        [
            torch.full((99, 2), 50.0).double() + normal(99, 2, 1, 0, 0.01),
            torch.full((1, 2), -50.0).double(),
        ]
    )
    assert precision_recall(real, fake)[1] == 1.0 and coverage(real, fake) == 0.0


def test_working_in_parts_changes_nothing():
    real, fake = normal(1100, 2), normal(1050, 2, 1)
    radii = torch.cdist(real, real).sort(dim=1).values[:, 4]
    torch.testing.assert_close(evaluation.neighbor_radii(real, 4), radii)
    inside = (torch.cdist(fake, real) <= radii).any(dim=1).double().mean().item()
    assert precision_recall(real, fake, k=4)[0] == inside


@pytest.mark.parametrize("k", [0, 10])
def test_k_must_leave_a_neighbor(k):
    with pytest.raises(ValueError, match=f"k={k} is outside 1 … 9"):
        precision_recall(normal(10, 2), normal(20, 2), k)
    with pytest.raises(ValueError, match=f"k={k} is outside 1 … 9"):
        coverage(normal(10, 2), normal(20, 2), k)


@pytest.mark.parametrize(
    "function", [frechet_distance, kernel_distance, precision_recall, coverage]
)
def test_bad_features_are_refused(function):
    good = normal(40, 3)
    spoilt = good.clone()
    spoilt[4, 1] = math.nan
    bad = {
        r"shape \(1, 3\).*at least 2": good[:1],
        "torch.int64": good.long(),
        r"shape \(40,\)": good[:, 0],
        "3 and 2 wide|2 and 3 wide": good[:, :2],
        "NaN or infinite": spoilt,
    }
    for words, features in bad.items():
        for pair in ((good, features), (features, good)):
            with pytest.raises(ValueError, match=words):
                function(*pair)


# The report


def test_compare_puts_every_figure_beside_its_floor(classifier, digits, features):
    reference, held_out = features
    samples = digits[1].images[:148].roll(6, -1)  # digits out of their place
    report = compare(classifier, samples, reference, held_out)
    mine = extract_features(classifier, samples)
    assert (report.n, report.reference_n, report.draws) == (148, 1500, 2)
    assert report.samples.frechet == frechet_distance(mine, reference)
    assert report.ratio == report.samples.frechet / report.floor.frechet > 2
    assert report.samples.kernel > 3 * abs(report.floor.kernel)
    for name in ("precision", "recall", "coverage"):
        assert getattr(report.samples, name) < getattr(report.floor, name) <= 1
    predictions = class_probabilities(classifier, mine).argmax(dim=1)
    assert report.classes == tuple(class_histogram(predictions, 10).tolist())
    assert sum(report.real_classes) == pytest.approx(1) and report.real_classes != report.classes


def test_the_floor_is_the_mean_over_disjoint_draws_of_n_held_out_images(
    monkeypatch, classifier, digits, features
):
    seen, score = [], evaluation.score
    monkeypatch.setattr(
        evaluation, "score", lambda features, *rest: seen.append(features) or score(features, *rest)
    )
    report = compare(classifier, digits[0].images[:70], *features)
    mine, *draws = seen
    assert torch.equal(mine, extract_features(classifier, digits[0].images[:70]))
    assert [len(draw) for draw in draws] == [70] * 4 and len(torch.cat(draws).unique(dim=0)) > 270
    distances = torch.tensor([frechet_distance(draw, features[0]) for draw in draws])
    assert report.floor.frechet == pytest.approx(distances.mean().item(), rel=1e-6)
    assert report.floor_spread.frechet == pytest.approx(distances.std().item(), rel=1e-5)
    assert all(0 < value < math.inf for value in dataclasses.astuple(report.floor_spread))
    seen.clear()
    assert compare(classifier, digits[0].images[:20], *features).draws == 10


def test_real_images_score_near_their_floor_and_noise_far_from_it(classifier, digits, features):
    train_set, test_set = digits
    half = features[1][:148]
    real = compare(classifier, test_set.images[148:296], features[0], half)
    assert 0.5 < real.ratio < 2
    noise = torch.randint(0, 256, (148, 1, 28, 28), generator=rng(), dtype=torch.uint8)
    assert compare(classifier, noise, features[0], half).ratio > 10 * real.ratio


def test_the_same_seed_gives_the_same_report(classifier, digits, features):
    state = torch.get_rng_state()
    one, two = (compare(classifier, digits[0].images[:50], *features, seed=3) for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), state)
    other = compare(classifier, digits[0].images[:50], *features, seed=4)
    assert other.samples.frechet == one.samples.frechet and other.floor.frechet != one.floor.frechet


def test_a_report_reads_well_and_goes_into_json(classifier, digits, features):
    report = compare(classifier, digits[0].images[:200], *features)
    text = str(report)
    for words in (
        "n = 200 samples",
        "1,500 real images",
        "floor: 200 held-out images",
        "own classifier, not Inception",
        "Fréchet distance",
        f"{report.samples.frechet:.2f}",
        f"{report.floor.frechet:.2f}",
        f"ratio {report.ratio:.2f}",
        f"{report.samples.kernel:.2f}",
        "precision",
        "recall",
        "coverage",
        f"{max(report.classes):.1%}",
    ):
        assert words in text
    several = compare(classifier, digits[0].images[:20], *features)
    assert "draws" not in text and "deviation of 10 draws" in str(several)
    assert f"{several.floor.kernel:.2f} ± {several.floor_spread.kernel:.2f}\n" in str(several)
    assert len({len(line) for line in text.splitlines()[2:] if "ratio" not in line}) == 1, (
        "columns do not line up"
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["n"] == 200 and values["ratio"] == report.ratio and values["floor_spread"] is None
    assert (
        values["samples"]["frechet"] == report.samples.frechet and "not Inception" in values["note"]
    )
    assert values["floor"]["frechet"] == report.floor.frechet and len(values["classes"]) == 10


def test_compare_refuses_a_floor_at_another_n(classifier, digits, features):
    with pytest.raises(ValueError, match=r"shape \(2, 1, 28, 28\), expected \(N, 96\)"):
        class_probabilities(classifier, digits[0].images[:2])
    with pytest.raises(
        ValueError, match="298 samples.*1500 reference and 297 held-out.*give 20 … 297"
    ):
        compare(classifier, digits[0].images[:298], *features)
    with pytest.raises(ValueError, match="100 samples.*50 reference.*give 20 … 50"):
        compare(classifier, digits[0].images[:100], features[0][:50], features[1])
    with pytest.raises(ValueError, match="19 samples"):
        compare(classifier, digits[0].images[:19], *features)


# Nearest neighbors and memorization


@pytest.mark.parametrize("kind", ["uint8", "float", "features"])
def test_nearest_neighbors_are_those_of_brute_force(kind):
    if kind == "features":
        queries, points = normal(30, 5), normal(200, 5, 1)
    else:
        queries, points = (
            torch.randint(0, 256, (n, 1, 6, 6), generator=rng(n), dtype=torch.uint8)
            for n in (300, 200)
        )
    if kind == "float":
        queries, points = queries.float() / 127.5 - 1, points.float() / 127.5 - 1
    distances, indices = nearest_neighbors(queries, points, k=4, chunk=70)
    every = (queries.flatten(1)[:, None].double() - points.flatten(1)[None].double()).norm(dim=2)
    expected = every.topk(4, largest=False)
    torch.testing.assert_close(distances, expected.values)
    torch.testing.assert_close(every.gather(1, indices), distances)
    assert distances.dtype == torch.float64 and (indices == expected.indices).double().mean() > 0.99


def test_a_copy_has_distance_exactly_0_and_chunks_smaller_than_k_work():
    points = torch.randint(0, 256, (50, 1, 28, 28), generator=rng(), dtype=torch.uint8)
    distances, indices = nearest_neighbors(points[[7, 49]], points, k=3, chunk=2)
    assert (
        indices[:, 0].tolist() == [7, 49]
        and distances[:, 0].tolist() == [0.0, 0.0]
        and (distances[:, 1] > 100).all()
    )
    distances, indices = nearest_neighbors(points[:2], points, k=50)
    assert indices.sort(dim=1).values.tolist() == [list(range(50))] * 2


@pytest.mark.parametrize("k", [0, 6])
def test_nearest_neighbors_refuses_what_does_not_fit(k):
    with pytest.raises(ValueError, match=f"k={k}.*1 … 5"):
        nearest_neighbors(torch.zeros(2, 3), torch.zeros(5, 3), k=k)
    with pytest.raises(ValueError, match=r"\(3,\) each, points \(4,\) each"):
        nearest_neighbors(torch.zeros(2, 3), torch.zeros(5, 4))


def test_memorization_finds_planted_copies(digits):
    train_set, test_set = digits
    order = torch.randperm(1500, generator=rng())
    train, fresh = train_set.images[order[:1100]], train_set.images[order[1100:]]
    noise = torch.randint(-4, 5, (40, 1, 28, 28), generator=rng())
    copied = (train[:40].int() + noise).clamp(0, 255).to(torch.uint8)
    found = memorization(torch.cat([copied, fresh[:160]]), train, fresh[160:])
    assert found.indices[:40, 0].tolist() == list(range(40)) and found.samples.shape == (200, 2)
    assert found.nearer(0.01) == pytest.approx(0.2, abs=0.04)
    samples, held_out = found.copies()
    assert samples == pytest.approx(0.2, abs=0.02) and held_out < 0.01
    clean = memorization(fresh[:160], train, fresh[160:])
    assert clean.nearer(0.05) == pytest.approx(0.05, abs=0.06) and clean.copies() == (0.0, 0.0)
    assert clean.held_out.shape == (240, 2) and torch.equal(clean.samples, found.samples[40:])


# Bits per dimension


def test_gaussian_kl_is_that_of_torch_distributions():
    mean_a, mean_b = normal(50, 3), normal(50, 3, 1)
    var_a, var_b = normal(50, 3, 2).exp(), normal(50, 3, 3).exp()
    from torch.distributions import Normal, kl_divergence

    expected = kl_divergence(Normal(mean_a, var_a.sqrt()), Normal(mean_b, var_b.sqrt()))
    torch.testing.assert_close(
        gaussian_kl(mean_a, var_a, mean_b, var_b), expected, rtol=1e-9, atol=1e-12
    )
    assert gaussian_kl(mean_a, var_a, mean_a, var_a).abs().max() == 0


def test_discretized_likelihood_sums_to_1_and_is_a_difference_of_normal_probabilities():
    values = torch.arange(256).double() / 127.5 - 1
    for mean in (-3.0, -1.0, -0.3, 0.0, 0.999, 1.7):
        for std in (1e-3, 0.02, 0.5, 10.0):
            log = discretized_log_likelihood(
                values, torch.tensor(mean).double(), torch.tensor(std**2).double()
            )
            assert log.exp().sum().item() == pytest.approx(1, abs=1e-12) and (log <= 0).all()
    from scipy.stats import norm

    edges = torch.cat(
        [torch.tensor([-math.inf]), values[1:] - 1 / 255, torch.tensor([math.inf])]
    ).numpy()
    cdf = norm.cdf(edges, loc=0.2, scale=0.3)
    expected = torch.from_numpy(cdf[1:] - cdf[:-1])
    found = discretized_log_likelihood(
        values, torch.tensor(0.2).double(), torch.tensor(0.09).double()
    ).exp()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-15)


def test_discretized_likelihood_stays_finite_and_right_far_out():
    """40 standard deviations away the mass underflows but its logarithm does not; both sides must
    mirror each other.
    """
    x = torch.tensor([0.0, 100 / 255, -100 / 255]).double()
    log = discretized_log_likelihood(
        x, x.flip(0) * 0 + torch.tensor([0.0, -0.4, 0.4]), torch.tensor(1e-4).double()
    )
    assert (
        log.isfinite().all()
        and log[1] == pytest.approx(log[2].item(), rel=1e-12)
        and log[1] < -2000
    )
    # the tail beyond the nearer edge, to leading order
    near, sigma = (100 / 255 - 1 / 255 + 0.4) / 0.01, 0.01
    tail = -(near**2) / 2 - math.log(near * math.sqrt(2 * math.pi))
    assert log[1].item() == pytest.approx(tail, abs=1e-3) and sigma
    images = torch.tensor([-1.0, 1.0]).double()
    far = discretized_log_likelihood(
        images, torch.tensor([3.0, -3.0]).double(), torch.tensor(1e-4).double()
    )
    assert far.isfinite().all() and far[0] == pytest.approx(far[1].item(), rel=1e-12)


def gaussian_images(n, mean, cov, seed=0):
    """Gray images of 2×2 pixels from N(mean, cov) in model range, rounded to uint8."""
    x = torch.tensor(mean) + normal(n, 4, seed) @ torch.linalg.cholesky(cov).T
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).view(n, 1, 2, 2)


MEAN = [0.1, -0.2, 0.0, 0.3]
COV = torch.diag(torch.tensor([0.02, 0.01, 0.015, 0.02], dtype=torch.float64)) + 0.01


def code_length(images):
    """Bits per pixel that the distribution itself needs for these images: its density at each,
    times the size of a bin.
    """
    density = torch.distributions.MultivariateNormal(torch.tensor(MEAN, dtype=torch.float64), COV)
    log_mass = density.log_prob(images.flatten(1).double() / 127.5 - 1) + 4 * math.log(2 / 255)
    return -log_mass.mean().item() / 4 / math.log(2)


def perfect(schedule):
    return GaussianDenoiser(schedule, torch.tensor(MEAN, dtype=torch.float64), COV)


def perfect_network(schedule, target, clamp):
    """The best denoiser once more, by way of a network that predicts `target`."""
    return Denoiser(as_network(perfect(schedule), schedule, target), schedule, target, clamp)


def test_the_bound_lies_above_the_true_code_length_and_comes_down_to_it_as_steps_grow():
    images, gaps = gaussian_images(400, MEAN, COV), []
    for timesteps in (25, 100, 1000):
        schedule = make_schedule("cosine", timesteps)
        bound = bits_per_dimension(perfect(schedule), schedule, images, "beta", generator=rng())
        gaps.append(bound.total - code_length(images))
    assert 0.15 > gaps[2] > 0 and gaps[1] > 1.3 * gaps[2] and gaps[0] > 1.3 * gaps[1], gaps


@pytest.mark.parametrize(
    ("target", "variance"),
    [("eps", "beta_tilde"), ("x0", "beta_tilde"), ("v", "beta_tilde"), ("eps", "beta")],
)
def test_every_term_is_the_closed_form_of_a_perfect_denoiser(target, variance):
    """E KL = ½(ln(s/β̃) + β̃/s − 1 + c²·E|x0 − x0_hat|²/s), with c the posterior's weight of x0 and
    s the chosen variance.
    """
    schedule = make_schedule("linear", 50, 20)
    images = gaussian_images(3000, MEAN, COV)
    denoise = perfect_network(schedule, target, clamp=False)
    bound = bits_per_dimension(denoise, schedule, images, variance, generator=rng())
    betas = schedule.betas.double()
    alpha_bars = (1 - betas).cumprod(dim=0)
    before = torch.cat([torch.ones(1).double(), alpha_bars[:-1]])
    beta_tilde = betas * (1 - before) / (1 - alpha_bars)
    s = (beta_tilde if variance == "beta_tilde" else betas)[1:]
    weight = (before.sqrt() * betas / (1 - alpha_bars))[1:]
    error = perfect(schedule).loss("x0").double()[1:]
    kl = (
        0.5
        * (torch.log(s / beta_tilde[1:]) + beta_tilde[1:] / s - 1 + weight**2 * error / s)
        / math.log(2)
    )
    # 12,000 squares: 1.3 % each, 4 times that
    torch.testing.assert_close(bound.terms[1:], kl, rtol=0.06, atol=1e-6)
    first = alpha_bars[-1].sqrt() * (images.double() / 127.5 - 1)
    prior = (0.5 * (first**2 - alpha_bars[-1] - torch.log1p(-alpha_bars[-1]))).mean() / math.log(2)
    assert bound.prior == pytest.approx(prior.item(), rel=1e-9)
    assert bound.total == pytest.approx(bound.prior + bound.terms.sum().item(), rel=1e-12)


class Blurry(nn.Module):
    """A network that is no optimum of anything, with a dropout that would show."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x_t, t, y=None):
        return self.dropout(
            0.9 * x_t + 0.1 * torch.tanh(x_t.flip(-1)) + (t / 100).view(-1, 1, 1, 1)
        )


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_the_bound_is_that_of_a_second_implementation(variance, clamp):
    """Written with torch.distributions, numpy's posterior and the paper's 1-based t; the same draws
    of noise.
    """
    from torch.distributions import Normal, kl_divergence

    schedule, model = make_schedule("cosine", 12), Blurry().train()
    images = torch.randint(0, 256, (6, 1, 4, 4), generator=rng(), dtype=torch.uint8)
    images[0, 0, 0] = torch.tensor([0, 255, 1, 254], dtype=torch.uint8)
    usual = Denoiser(model, schedule, "eps", clamp)
    # schedule.alpha_bars were rounded after the product, the bound's ᾱ are products of rounded
    # alphas: where β = 0.999, at the last step, they differ by a part in 10⁵. This denoiser has the
    # bound's.
    same = Denoiser(model, evaluation.in_float64(schedule), "eps", clamp)
    found, nearly = (
        bits_per_dimension(one, schedule, images, variance, batch_size=4, generator=rng(5))
        for one in (same, usual)
    )
    assert usual.training and same.training and model.training and model.dropout.training

    beta = [0.0, *schedule.betas.double().tolist()]  # beta[t], t = 1 … T
    alpha_bar = [math.prod(1 - b for b in beta[: t + 1]) for t in range(13)]
    x0, g, model = images.double() / 127.5 - 1, rng(5), model.eval()
    totals, terms = [], torch.zeros(12, dtype=torch.float64)
    for part in (x0[:4], x0[4:]):
        last = Normal(math.sqrt(alpha_bar[12]) * part, math.sqrt(1 - alpha_bar[12]))
        total = kl_divergence(last, Normal(torch.zeros(1).double(), 1.0)).flatten(1).sum(dim=1)
        for t in range(1, 13):
            eps = torch.randn(part.shape, generator=g).double()
            x_t = math.sqrt(alpha_bar[t]) * part + math.sqrt(1 - alpha_bar[t]) * eps
            eps_hat = model(x_t.float(), torch.full((len(part),), t - 1)).double()
            x0_hat = (x_t - math.sqrt(1 - alpha_bar[t]) * eps_hat) / math.sqrt(alpha_bar[t])
            x0_hat = x0_hat.clamp(-1, 1) if clamp else x0_hat

            def mean(x, t=t, x_t=x_t):
                a = math.sqrt(alpha_bar[t - 1]) * beta[t] / (1 - alpha_bar[t])
                b = math.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
                return a * x + b * x_t

            def tilde(t):
                return beta[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])

            if t == 1:
                p = Normal(mean(x0_hat), math.sqrt(tilde(2)))
                top = torch.where(part > 0.999, torch.ones(()).double(), p.cdf(part + 1 / 255))
                bottom = torch.where(part < -0.999, torch.zeros(()).double(), p.cdf(part - 1 / 255))
                nats = -(top - bottom).log()
                usable = (top - bottom) > 1e-9  # beyond, this form has no digits left
                if not usable.all():
                    nats = torch.where(
                        usable, nats, -discretized_log_likelihood(part, p.mean, p.variance)
                    )
            else:
                q = Normal(mean(part), math.sqrt(tilde(t)))
                nats = kl_divergence(
                    q,
                    Normal(
                        mean(x0_hat), math.sqrt(tilde(t) if variance == "beta_tilde" else beta[t])
                    ),
                )
            total = total + nats.flatten(1).sum(dim=1)
            terms[t - 1] += nats.sum() / (6 * 16 * math.log(2))
        totals.append(total / (16 * math.log(2)))
    totals = torch.cat(totals)
    torch.testing.assert_close(found.terms, terms, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(nearly.terms[:-1], terms[:-1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(nearly.terms[-1], terms[-1], rtol=5e-5, atol=1e-9)
    assert found.total == pytest.approx(totals.mean().item(), rel=1e-6)
    assert found.error == pytest.approx(totals.std().item() / 6**0.5, rel=1e-5)


def test_few_calls_give_the_same_total_on_average_and_close_to_it():
    schedule = make_schedule("linear", 200, 5)
    images = gaussian_images(2000, MEAN, COV)
    model = perfect(schedule)
    whole = bits_per_dimension(model, schedule, images[:500], generator=rng())
    few = bits_per_dimension(model, schedule, images, calls=8, generator=rng(1))
    assert abs(few.total - whole.total) < 4 * math.hypot(few.error, whole.error)
    assert few.error < 0.1 and few.terms.shape == (200,)
    seen = ~few.terms.isnan()
    torch.testing.assert_close(few.terms[:3], whole.terms[:3], rtol=0.15, atol=0)
    assert seen[:20].all()


def test_weights_make_any_sum_right():
    """Σ weight · f(t) averages to Σ f(t), whatever f is: here for each indicator function."""
    times, weights = weighted_timesteps(40_000, 30, 7, rng())
    assert times.shape == weights.shape == (40_000, 7) and (times.diff(dim=1) >= 0).all()
    sums = (
        torch.zeros(30, dtype=torch.float64).index_add(0, times.flatten(), weights.flatten())
        / 40_000
    )
    squares = (
        torch.zeros(30, dtype=torch.float64).index_add(0, times.flatten(), weights.flatten() ** 2)
        / 40_000
    )
    assert ((sums - 1).abs() < 4.5 * (squares / 40_000).sqrt()).all()
    times, weights = weighted_timesteps(3, 5, None)
    assert times.tolist() == [[0, 1, 2, 3, 4]] * 3 and (weights == 1).all()
    for calls in (0, 31):
        with pytest.raises(ValueError, match=f"calls={calls} is outside 1 … 30"):
            weighted_timesteps(2, 30, calls)


def test_the_prior_term_tells_how_much_signal_the_last_step_leaves():
    x0 = torch.ones(2, 1, 4, 4)
    assert prior_term(make_schedule("linear", 1000), x0).max() < 1e-4
    with pytest.warns(UserWarning, match="still holds"):
        short = NoiseSchedule(linear_betas(50))
    assert prior_term(short, x0).min() > 0.3


def test_a_random_network_needs_more_bits_than_a_perfect_one_and_a_bad_choice_is_refused():
    schedule = make_schedule("linear", 100, 10)
    images = gaussian_images(64, MEAN, COV)
    good = perfect_network(schedule, "eps", clamp=True)
    bad = Denoiser(lambda x_t, t, y: torch.zeros_like(x_t), schedule)
    best, worst = (
        bits_per_dimension(one, schedule, images, generator=rng()) for one in (good, bad)
    )
    assert worst.total > best.total + 1 and worst.n == 64
    assert math.isnan(
        bits_per_dimension(good, schedule, images[:1], calls=2, generator=rng()).error
    )
    with pytest.raises(ValueError, match="score"):
        bits_per_dimension(Denoiser(good.model, schedule, "score"), schedule, images[:2])
    with pytest.raises(ValueError, match="learned"):
        bits_per_dimension(good, schedule, images[:2], variance="learned")
