"""Recipes: one frozen object from TOML, from flags or from code, which reads back as it was written."""

import tomllib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltavit import Training, Where, method, methods
from deltavit.core.errors import DeltavitError, MethodError, RecipeError, TrainingError
from deltavit.train.recipe import DataSection, ModelSection, Recipe, read_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
POSITIVE = st.floats(1e-12, 1e12)
METHODS = st.one_of(
    st.builds(
        lambda **options: {"name": "lora", **options},
        rank=st.integers(1, 512), scale=st.floats(-1e6, 1e6), dropout=st.floats(0, 0.9),
        where=st.fixed_dictionaries(
            {"roles": st.lists(st.sampled_from(["q", "k", "v", "o", "fc1", "fc2"]), min_size=1, unique=True)},
            optional={"blocks": st.lists(st.integers(-12, 11), min_size=1, max_size=4)},
        ),
    ),
    st.builds(lambda which: {"name": "bitfit", "which": which}, st.sampled_from(["all", "linear"])),
    st.builds(
        lambda **options: {"name": "kadaptation", **options},
        n=st.integers(1, 9), bias=st.booleans(), share=st.booleans(),
    ),
    st.builds(lambda name: {"name": name}, st.sampled_from(sorted(methods()))),
)  # fmt: skip
RECIPES = st.builds(
    Recipe,
    model=st.builds(ModelSection, name=TEXT, weights=st.none() | TEXT, image_size=st.none() | st.integers(1, 4096)),
    method=METHODS,
    data=st.builds(DataSection, path=TEXT, val=POSITIVE, seed=st.integers(), train_list=st.none() | TEXT),
    train=st.builds(
        Training, epochs=st.integers(1, 10**6), lr=POSITIVE, head_lr=st.none() | POSITIVE, clip=st.none() | POSITIVE,
        warmup=st.floats(0, 1), mixup=POSITIVE, seed=st.integers(0, 2**63 - 1),
        augment=st.sampled_from(["none", "light"]),
        optimizer=st.sampled_from(["adamw", "sgd"]), precision=st.sampled_from(["auto", "fp32", "bf16"]),
    ),
    device=TEXT,
)  # fmt: skip


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
        return tmp_path / "recipe.toml"

    return write


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=RECIPES)
def test_a_recipe_reads_back_as_it_was_written(recipe, written):
    again = read_recipe(written(recipe.toml()))
    assert (again.model, again.data, again.train, again.device) == (
        recipe.model,
        recipe.data,
        recipe.train,
        recipe.device,
    )
    assert again.build_method() == recipe.build_method()
    assert again.toml() == recipe.toml()


def test_all_defaults_are_written_out():
    written = tomllib.loads(Recipe().toml())
    assert written["method"] == {
        "name": "lora", "rank": 8, "scale": 1.0, "dropout": 0.0, "where": {"roles": ["q", "v"]},
    }  # fmt: skip
    assert written["train"]["head_lr"] == "none"
    assert written["train"]["clip"] == 1.0
    assert set(written["train"]) == set(vars(Training()))


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        (["method.rank=16"], {"rank": 16}),
        (["method.rank=16", "method.scale=2"], {"rank": 16, "scale": 2.0}),
        (["method.where.roles=q,k"], {"where": Where(roles=("q", "k"))}),
        (["method.where.roles=q", "method.where.blocks=0,-1"], {"where": Where(roles=("q",), blocks=(0, -1))}),
        (["method.where.roles=q", "method.where.blocks=[3]"], {"where": Where(roles=("q",), blocks=(3,))}),
        (["method.where.roles=q", "method.where.blocks=3"], {"where": Where(roles=("q",), blocks=(3,))}),
    ],
)
def test_method_options_are_the_same_object_from_toml_flags_and_code(changes, options, written):
    from_code = methods()["lora"](**options)
    assert read_recipe(changes=changes).build_method() == from_code
    assert (
        read_recipe(written(Recipe(method={"name": "lora", **from_code.options()}).toml())).build_method() == from_code
    )


def test_the_last_word_wins_flags_over_the_file_and_changes_over_flags(written):
    file = written("[train]\nlr = 0.1\nepochs = 3\nseed = 1\n")
    made = read_recipe(file, ["train.lr=0.3"], train={"lr": 0.2, "epochs": 4, "seed": None})
    assert (made.train.lr, made.train.epochs, made.train.seed) == (0.3, 4, 1)


def test_another_method_takes_none_of_the_files_options(written):
    file = written('[method]\nname = "lora"\nrank = 16\n')
    assert read_recipe(file, method={"name": "lora"}).build_method() == method("lora", rank=16)
    assert read_recipe(file, method={"name": "lora-fix"}).build_method() == method("lora-fix")
    assert read_recipe(file, ["method.name=bitfit"]).build_method() == method("bitfit")


@pytest.mark.parametrize("text", ["none", '"none"'])
def test_clip_and_head_lr_can_be_none(text):
    made = read_recipe(changes=[f"train.clip={text}", f"train.head_lr={text}"])
    assert made.train.clip is None
    assert made.train.head_lr is None


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (["train.lrr=1"], RecipeError, "did you mean 'lr'?"),
        (["model.nmae=x"], RecipeError, "did you mean 'name'?"),
        (["data.pth=x"], RecipeError, "did you mean 'path'?"),
        (["trian.lr=1"], RecipeError, "did you mean 'train'?"),
        (["method.rnk=1"], MethodError, "did you mean 'rank'?"),
        (["method.name=lorra"], MethodError, "did you mean 'lora'?"),
        (["method.where.role=q"], MethodError, "did you mean 'roles'?"),
        (["train.epochs=many"], RecipeError, "train.epochs = 'many'"),
        (["train.epochs=1.5"], RecipeError, "train.epochs = 1.5"),
        (["train.epochs=0"], TrainingError, "train.epochs must be at least 1"),
        (["train.lr=-1"], TrainingError, "train.lr must be zero or more"),
        (["train.optimizer=adam"], RecipeError, "'adamw' or 'sgd'"),
        (["model.image_size=0"], RecipeError, "model.image_size = 0"),
        (["data.broken=ignore"], RecipeError, "'error' or 'skip'"),
        (["method.rank=big"], MethodError, "lora.rank = 'big' is not int"),
        (["method.rank=0"], MethodError, "at least 1"),
        (["lr"], RecipeError, "is not key=value"),
        (["=1"], RecipeError, "is not key=value"),
        (["train=1"], RecipeError, "train = 1"),
        (["train.lr.x=1", "train.lr.y.z=2"], DeltavitError, "lr"),
        (["method=3"], RecipeError, "method = 3"),
        (["method=lroa"], DeltavitError, "did you mean 'lora'"),
        (["method=lora", "method.lora=3"], DeltavitError, "lora"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_that_names_it(changes, error, says):
    with pytest.raises(error) as refused:
        read_recipe(changes=changes)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train.lr = ", "is not TOML"),
        ("[train]\nlr = 'fast'", "train.lr = 'fast'"),
        ("method = 3", "method = 3"),
        ("[train]\nlearning_rate = 1", "no key in [train] named 'learning_rate'"),
        ("epochs = 3", "no section named 'epochs'"),
        ("[train.lr]\nx = 1", "train.lr"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(text, says, written):
    with pytest.raises(RecipeError) as refused:
        read_recipe(written(text), method={"name": "lora"} if says != "method = 3" else {})
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nothing\.toml: No such file"):
        read_recipe(tmp_path / "nothing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not TOML"):
        read_recipe(tmp_path / "bytes.toml")
