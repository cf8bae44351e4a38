"""The recipes of the sources to the digit, and each of them trained and drawn on a small scale."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_utils import __main__ as command
from ddpm_utils import checkpoints, config, data, diffusion, pretrained, recipes, runs, training
from ddpm_utils.cli import drawing
from ddpm_utils.cli import sample as sample_command
from ddpm_utils.config import TrainConfig
from ddpm_utils.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("own_folders")
# Written down from the sources, apart from the code.
PUBLISHED = {
    "anime": {
        "image_size": 48,
        "channels": 3,
        "pad": 0,
        "batch_size": 32,
        "lr": 1e-4,
        "epochs": 50,
        "ema_decay": 0,
    },
    "article": {
        "image_size": 28,
        "channels": 1,
        "pad": 0,
        "batch_size": 128,
        "lr": 1e-3,
        "epochs": 20,
        "ema_decay": 0,
    },
    "mnist32": {
        "image_size": 32,
        "channels": 1,
        "pad": 2,
        "batch_size": 64,
        "lr": 2e-5,
        "epochs": 75,
        "ema_decay": 0.9999,
    },
}
ALL = {
    "timesteps": 1000,
    "schedule": "linear",
    "beta_scale": 1,
    "target": "eps",
    "timestep_draw": "uniform",
    "optimizer": "adam",
    "weight_decay": 0,
    "num_classes": 0,
}


def error_of(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


# what they say


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_the_published_one_to_the_digit(name):
    cfg = TrainConfig(**recipes.fields(name, **({"dataset": "./faces"} if name == "anime" else {})))
    for field, value in (ALL | PUBLISHED[name] | {"model": name}).items():
        assert getattr(cfg, field) == value, field
    assert {training.learning_rate(step, 1000, cfg) for step in range(1000)} == {cfg.lr}
    assert cfg.grad_clip == 1e6  # no gradient is that long


def test_the_guide_takes_its_own_advice():
    cfg = TrainConfig(**recipes.fields("guide"))
    assert (
        all(getattr(cfg, field) == value for field, value in ALL.items()) and cfg.model == "guide"
    )
    rates = [training.learning_rate(step, 100, cfg) for step in range(100)]
    assert rates == sorted(rates, reverse=True) and rates[-1] < rates[0] / 10 and cfg.grad_clip == 1


def test_one_recipe_alone_has_images_in_another_range():
    assert [
        name for name, recipe in RECIPES.items() if recipe.config.get("data_range") == "unit"
    ] == ["mnist32"]


def test_what_is_drawn_is_what_was_shown():
    anime, article, mnist32 = (RECIPES[name] for name in ("anime", "article", "mnist32"))
    assert (anime.images, anime.columns, anime.variance) == (12, 6, "beta_tilde")
    assert (article.images, article.frames, article.filmed, article.variance) == (
        100,
        100,
        16,
        "beta",
    )
    assert (
        mnist32.strip == (999, 700, 550, 400, 300, 200, 100, 50, 15, 0)
        and mnist32.variance == "beta"
    )
    assert mnist32.images == 10 and not any(
        (anime.strip, article.strip, anime.frames, mnist32.frames)
    )


def test_recipes_are_named_after_the_gallery():
    assert tuple(sorted(RECIPES)) == config.MODELS[1:]


def test_what_is_chosen_goes_before_the_recipe_and_channels_follow_the_data():
    assert recipes.fields("article", dataset="mnist", lr=1e-4)["lr"] == 1e-4
    assert [
        recipes.fields("anime", dataset=where)["channels"] for where in ("./faces", "mnist")
    ] == [3, 1]
    assert recipes.fields("article", dataset="./faces")["channels"] == 1
    assert recipes.fields("guide", dataset="./faces", channels=3)["channels"] == 3


def test_bad_asks_are_told():
    with pytest.raises(ValueError, match="recipe='manga' is not known: choose one of 'anime'"):
        recipes.fields("manga")
    with pytest.raises(ValueError, match="for images of your own: .*--dataset ./faces"):
        recipes.fields("anime")


# the range [0, 1]


def test_the_two_ways_into_the_unit_range_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = data.to_model_range(images, "unit")
    assert (x.min(), x.max()) == (0, 1)
    assert torch.equal(data.to_image_range(data.to_symmetric(x, "unit")), images)
    assert data.to_symmetric(x, "symmetric") is x


@pytest.mark.parametrize(("data_range", "low"), [("symmetric", -1), ("unit", 0)])
def test_training_and_measuring_take_images_of_the_configs_range(
    tiny,
    net,
    monkeypatch,
    data_range,
    low,
):
    """Seen by `q_sample`, through which every image goes on its way to the network."""
    cfg, seen = tiny(data_range=data_range, batch_size=2, epochs=0.5), []
    q_sample = diffusion.q_sample

    def watch(schedule, x0, t, eps):
        seen.extend(x0.flatten(1).aminmax(dim=1))
        return q_sample(schedule, x0, t, eps)

    for module in (diffusion, training):
        monkeypatch.setattr(module, "q_sample", watch)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[..., 0] = 255
    for _ in runs.train(training.TrainState(cfg, net(cfg)), images, images):
        pass
    assert len(seen) == 4  # a training step and a measurement, lowest and highest values of each
    assert {value for x in seen for value in x.tolist()} == {low, 1}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_in_the_unit_range_nothing_is_clamped_and_images_come_back_in_model_range(
    tiny, monkeypatch, sampler
):
    """A network that always says 1.5 in its own range, with x̂0 as its target: clamped it would be
    1.
    """
    cfg = tiny(data_range="unit", target="x0")
    x, kept = drawing.draw(
        lambda x_t, t, y: torch.full_like(x_t, 1.5), cfg, drawing.plan(cfg, 2, sampler), "cpu", [-1]
    )
    assert torch.allclose(x, torch.full_like(x, 2 * 1.5 - 1)) and torch.equal(kept[-1], x)
    cfg = tiny(target="x0")
    x, _ = drawing.draw(
        lambda x_t, t, y: torch.full_like(x_t, 1.5), cfg, drawing.plan(cfg, 2, sampler), "cpu"
    )
    assert torch.allclose(x, torch.ones_like(x))


# trained and drawn


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_and_draws_in_fast_mode(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_FAST", "1")
    run, out = tmp_path / "run", tmp_path / "out"
    assert command.main(["train", "--recipe", name, "--dataset", "digits", "--out", str(run)]) == 0
    cfg = config.from_dict(checkpoints.read(run / "last.pt")["config"])
    asked = TrainConfig(**recipes.fields(name, dataset="digits"))
    assert cfg == config.for_this_run(asked) and cfg.channels == 1
    assert (
        command.main(
            ["sample", "--recipe", name, "--weights", str(run), "--n", "2", "--out", str(out)]
        )
        == 0
    )
    recipe, side = RECIPES[name], cfg.image_size
    files = (
        ["grid.png", "samples.json"]
        + ["samples.gif"] * bool(recipe.frames)
        + ["strip.png"] * bool(recipe.strip)
    )
    assert (
        sorted(path.name for path in out.iterdir()) == sorted(files)
        and f"wrote {files[0]}" in capsys.readouterr().out
    )
    assert iio.imread(out / "grid.png").shape == (side, recipe.columns * (side + 2) - 2)
    if recipe.frames:  # more than T here, and equal ones become one
        assert len(iio.imread(out / "samples.gif")) >= cfg.timesteps


def test_the_images_of_a_recipe_are_those_of_its_own_sampler(monkeypatch, tiny):
    """Variance and no clamp reach the sampler; the times of the strip follow T."""
    options = type(
        "Options", (), {"recipe": "mnist32", "sampler": None, "steps": None, "n": None, "seed": 4}
    )
    how, views = sample_command.of_recipe(options, tiny(timesteps=100))
    assert how == drawing.Plan(10, "ddpm", 100, 4, "beta", False)
    assert (
        views.strip == [99, 70, 55, 40, 30, 20, 10, 5, 1, 0]
        and views.rows == 10
        and views.film == []
    )
    assert sample_command.of_recipe(options, tiny(timesteps=1000))[1].strip == list(
        RECIPES["mnist32"].strip
    )
    options.recipe = "article"
    how, views = sample_command.of_recipe(options, tiny(timesteps=1000))
    assert (how.n, how.variance, len(views.film), views.film[0], views.film[-1]) == (
        100,
        "beta",
        100,
        999,
        -1,
    )
    asked = []

    def sampler(
        denoise,
        schedule,
        shape,
        variance,
        *more,
    ):
        asked.extend([variance, denoise.clamp])
        return iter([(-1, torch.zeros(2, 1, 8, 8), 0)])

    monkeypatch.setattr(drawing.sampling, "ddpm_sample", sampler)
    drawing.draw(None, tiny(), drawing.Plan(2, "ddpm", 100, 0, "beta", False), "cpu")
    assert asked == ["beta", False]


@pytest.mark.parametrize("name", ["anime", "article"])
def test_a_recipe_learns_from_a_folder_in_its_own_colors(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST", "1")
    (tmp_path / "faces").mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(
            tmp_path / "faces" / f"{i}.png"
        )
    flags = [
        "train",
        "--recipe",
        name,
        "--dataset",
        str(tmp_path / "faces"),
        "--out",
        str(tmp_path / "run"),
    ]
    assert command.main(flags) == 0
    assert iio.imread(tmp_path / "run" / "samples.png").ndim == (3 if name == "anime" else 2)
    assert command.main([*flags, "--resume"]) == 0  # the same flags contradict nothing
    assert command.main([*flags, "--resume", "--lr", "0.01"]) == 2


def test_without_weights_the_run_of_the_recipe_is_found_or_asked_for(fast, capsys):
    assert command.main(["sample", "--recipe", "article"]) == 2
    assert "no run of the recipe 'article'" in error_of(capsys)
    cfg = config.for_this_run(TrainConfig(**RECIPES["article"].config))
    folder = fast / "outputs" / "runs" / cfg.run_name()
    checkpoints.save(folder / "last.pt", training.TrainState(cfg, pretrained.build(cfg)))
    assert command.main(["sample", "--recipe", "article", "--n", "1"]) == 0
    assert (fast / "outputs" / "samples" / "article" / "grid.png").is_file()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "train --recipe anime --out {tmp}/new",
            "for images of your own: name their folder, as in --dataset ./faces",
        ),
        ("train --dataset faces --out {tmp}/new", "dataset='faces' is not known"),
        ("train --dataset {tmp}/none --out {tmp}/new", "no folder"),
        ("train --dataset {tmp} --out {tmp}/new", "holds no image"),
        (
            "train --recipe article --dataset digits --image-size 32 --out {tmp}/new",
            "expected (batch, 1, 28, 28)",
        ),
        (
            "train --recipe mnist32 --dataset digits --image-size 28 --out {tmp}/new",
            "must be multiples of 8: try 24 or 32",
        ),
        (
            "train --recipe article --dataset digits --channels 3 --out {tmp}/new",
            "published for gray images",
        ),
        ("sample --recipe anime", "no run of the recipe 'anime'"),
        (
            "sample --recipe anime --weights fashion_mnist --steps 5",
            "leave --sampler and --steps out",
        ),
        (
            "sample --recipe anime --weights fashion_mnist --sampler ddim",
            "leave --sampler and --steps out",
        ),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, capsys, line, says):
    place = tmp_path / "place"
    place.mkdir()
    assert command.main(line.format(tmp=place).split()) == 2
    assert says in error_of(capsys) and list(place.iterdir()) == []


def test_weights_of_a_folder_are_not_measured(tmp_path, tiny, net, capsys):
    cfg = tiny(dataset="./faces")
    checkpoints.save(tmp_path / "last.pt", training.TrainState(cfg, net(cfg)))
    assert command.main(["evaluate", "--weights", str(tmp_path)]) == 2
    assert "these weights draw ./faces: the metrics need a classifier" in error_of(capsys)
