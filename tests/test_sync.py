"""Idea code stands in the lesson that introduces it and, identically, in
the package; nowhere else.
"""

import ast
import importlib
import inspect

import pytest
from lesson_files import code_of, definitions, lesson_names, read_lesson

# The one table of what is built where. A definition that is missing, or stands a second time, fails
# a test.
BUILT_IN = {
    "01_forward_process": {
        "schedules": ["linear_betas", "cosine_betas", "NoiseSchedule"],
        "diffusion": ["at", "q_sample"],
    },
    "02_time_embeddings": {"embeddings": ["sinusoidal_embedding", "TimeEmbedding"]},
    "03_unet": {
        "unet": [
            "fold_pixels",
            "unfold_pixels",
            "zero_init",
            "ResBlock",
            "SelfAttention",
            "DownLevel",
            "UpLevel",
            "Upsample",
            "UNet",
        ]
    },
    "04_training": {
        "diffusion": ["velocity", "training_target", "predict_x0", "diffusion_loss"],
        "training": ["sample_timesteps", "train_step", "EMA", "learning_rate"],
        "optimizer": ["orthogonalize", "Muon"],
    },
    "05_sampling": {
        "diffusion": ["Denoiser", "q_posterior", "p_mean_variance", "p_sample"],
        "sampling": ["ddpm_sample"],
    },
    "06_fast_sampling": {
        "sampling": [
            "spaced_timesteps",
            "ddim_step",
            "multistep_guess",
            "ddim_sample",
            "dpm_solver_sample",
            "ddim_encode",
        ]
    },
    "07_guidance": {"training": ["drop_labels"], "sampling": ["Guided"]},
    "08_evaluation": {
        "evaluation": [
            "frechet_distance",
            "kernel_distance",
            "neighbor_radii",
            "precision_recall",
            "coverage",
            "gaussian_kl",
            "discretized_log_likelihood",
            "prior_term",
            "bound_term",
        ]
    },
    "09_exact_denoiser": {"oracle": ["GaussianDenoiser", "MixtureDenoiser", "DataDenoiser"]},
}
PLACES = [
    (lesson, module, name)
    for lesson, modules in BUILT_IN.items()
    for module, names in modules.items()
    for name in names
]


def bare(node: ast.AST) -> str:
    """The tree as text, with every docstring taken out."""
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(inner) is not None
        ):
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


@pytest.mark.parametrize(
    ("lesson", "module", "name"), PLACES, ids=[f"{lesson[:2]}-{name}" for lesson, _, name in PLACES]
)
def test_lesson_and_package_define_the_same(lesson, module, name):
    in_lesson = definitions(code_of(read_lesson(lesson))).get(name, [])
    assert len(in_lesson) == 1, f"{name} stands {len(in_lesson)} times in {lesson}, expected once"
    package = inspect.getsource(importlib.import_module(f"ddpm_utils.{module}"))
    assert bare(in_lesson[0]) == bare(definitions(package)[name][0]), (
        f"{name} differs between {lesson} and {module}.py"
    )


@pytest.mark.parametrize("lesson", lesson_names())
def test_no_lesson_defines_what_another_builds(lesson):
    own = {name for names in BUILT_IN.get(lesson, {}).values() for name in names}
    others = {name for _, _, name in PLACES} - own
    again = others & set(definitions(code_of(read_lesson(lesson))))
    assert not again, f"{lesson} defines {sorted(again)} again: import them from ddpm_utils"


@pytest.mark.parametrize(("lesson", "module", "name"), PLACES, ids=[name for _, _, name in PLACES])
def test_synced_definitions_fit_a_cell(lesson, module, name):
    source = inspect.getsource(importlib.import_module(f"ddpm_utils.{module}"))
    (node,) = definitions(source)[name]
    bare(node)  # takes the docstrings out
    lines = len(ast.unparse(node).splitlines())
    assert lines <= 40, f"{name} is {lines} lines long"


def test_the_comparison_sees_a_changed_line():
    """The oracle of this file: docstrings are ignored, one changed operator is not."""
    one, two, three = (
        ast.parse(text).body[0]
        for text in (
            'def f(x):\n    "a"\n    return x + 1',
            "def f(x):\n    return x + 1",
            "def f(x):\n    return x - 1",
        )
    )
    assert bare(one) == bare(two) != bare(three)
