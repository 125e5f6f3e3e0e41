"""Checkpoints come back bit for bit, on any mesh, or say why not."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from llmjax import sharding
from llmjax.errors import UserError
from llmjax.models.spec import ParamSpec, abstract_params
from llmjax.sharding import MeshConfig
from llmjax.training import checkpoint
from llmjax.training.checkpoint import Checkpoints, delete, load_params, save_params
from llmjax.training.state import abstract_state, init_state

SPECS = {
    "matrix": ParamSpec((4, 8), ("embed", "mlp"), std=1.0),
    "scale": ParamSpec((8,), (None,), constant=1.0),
}


def test_parameters_come_back_on_any_mesh(tmp_path):
    params, folder = tiny.draw(SPECS), str(tmp_path / "params")
    save_params(folder, params)
    for mesh in (None, sharding.make_mesh(MeshConfig(fsdp=4, tensor=2))):
        abstract = abstract_params(SPECS, mesh)
        got = load_params(folder, abstract)
        tiny.assert_trees_equal(got, params)
        assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, abstract)


def test_parameters_saved_from_a_mesh_come_back_without_one(tmp_path):
    mesh, folder = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2)), str(tmp_path / "params")
    params = tiny.draw(SPECS)
    save_params(folder, jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, abstract_params(SPECS, mesh)))
    tiny.assert_trees_equal(load_params(folder, abstract_params(SPECS)), params)


def test_saving_again_replaces(tmp_path):
    folder = str(tmp_path / "params")
    save_params(folder, tiny.draw(SPECS, 0))
    save_params(folder, tiny.draw(SPECS, 1))
    tiny.assert_trees_equal(load_params(folder, abstract_params(SPECS)), tiny.draw(SPECS, 1))
    assert os.listdir(tmp_path) == ["params"]


def test_missing_or_different_parameters_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no parameters there; run the stage"):
        load_params(str(tmp_path / "nowhere"), abstract_params(SPECS))
    folder = str(tmp_path / "params")
    save_params(folder, tiny.draw(SPECS))
    renamed = {"other": SPECS["matrix"], "scale": SPECS["scale"]}
    with pytest.raises(UserError, match="params: this checkpoint cannot be read") as error:
        load_params(folder, abstract_params(renamed))
    assert "\n" not in str(error.value)


def test_parameters_of_another_size_are_refused(tmp_path):
    folder = str(tmp_path / "params")
    save_params(folder, tiny.draw(SPECS))
    larger = SPECS | {"scale": ParamSpec((9,), (None,), constant=1.0)}
    with pytest.raises(UserError, match="params: this checkpoint cannot be read"):
        load_params(folder, abstract_params(larger))


def files_of(folder) -> list[str]:
    return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def flip(path: str, rng) -> None:
    with open(path, "r+b") as file:
        place = int(rng.integers(os.path.getsize(path)))
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << int(rng.integers(8))]))


def cut(path: str, rng) -> None:
    os.truncate(path, int(rng.integers(os.path.getsize(path))))


def remove(path: str, rng) -> None:
    os.remove(path)


WAYS = (flip, cut, remove)


@pytest.mark.parametrize("way", WAYS)
def test_damaged_parameters_are_one_line(tmp_path, way):
    params, whole, folder = tiny.draw(SPECS), tmp_path / "whole", tmp_path / "params"
    save_params(str(whole), params)
    files = [path for path in files_of(whole) if os.path.getsize(path)]
    assert len(files) > 5
    for seed, path in enumerate(files):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        way(path.replace(str(whole), str(folder)), np.random.default_rng(seed))
        with pytest.raises(UserError, match=r"params: damaged \(\S.*\); restore it from a copy, or delete") as error:
            load_params(str(folder), abstract_params(SPECS))
        assert "\n" not in str(error.value)


def test_parameters_without_digests_are_checked_for_their_sizes(tmp_path):
    folder = str(tmp_path / "params")
    save_params(folder, tiny.draw(SPECS), digests=False)
    tiny.assert_trees_equal(load_params(folder, abstract_params(SPECS)), tiny.draw(SPECS))
    (tmp_path / "params" / "more").write_text("x")
    with pytest.raises(UserError, match="more does not belong there"):
        load_params(folder, abstract_params(SPECS))
    (tmp_path / "params" / "more").unlink()
    cut(files_of(folder)[0], np.random.default_rng(0))
    with pytest.raises(UserError, match="bytes instead of"):
        load_params(folder, abstract_params(SPECS))


def states(tx):
    abstract = abstract_state(SPECS, tx, None)
    return abstract, init_state(tiny.draw(SPECS), tx, abstract)


def test_the_newest_state_comes_back_and_old_ones_go(tmp_path):
    abstract, state = states(optax.adam(0.1))
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"), keep=2)
    assert checkpoints.restore(abstract) is None
    for step in (3, 5, 9):
        checkpoints.save(step, state.replace(step=jnp.int32(step)))
    checkpoints.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["5", "9"]
    again = Checkpoints(str(tmp_path / "checkpoints"))
    tiny.assert_trees_equal(again.restore(abstract), state.replace(step=np.int32(9)))
    again.close()


@pytest.fixture(scope="module", name="saved")
def make_saved(tmp_path_factory):
    """A folder of two checkpoints, and the states in them."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    abstract, state = states(optax.adam(0.1))
    checkpoints = Checkpoints(str(folder))
    old, new = (state.replace(step=jnp.int32(step), params=tiny.draw(SPECS, step)) for step in (3, 7))
    for step, one in ((3, old), (7, new)):
        checkpoints.save(step, one)
    checkpoints.close()
    return folder, abstract, jax.device_get(old), jax.device_get(new)


@pytest.mark.parametrize("seed", range(24))
def test_damage_is_found_before_a_number_is_used_and_the_state_before_is_taken(saved, tmp_path, seed):
    whole, abstract, old, new = saved
    rng, said, folder = np.random.default_rng(seed), [], tmp_path / "checkpoints"
    shutil.copytree(whole, folder)
    files = [path for path in files_of(folder / "7") if os.path.getsize(path)]
    path = files[int(rng.integers(len(files)))]
    WAYS[seed % len(WAYS)](path, rng)
    checkpoints = Checkpoints(str(folder), say=said.append)
    got = checkpoints.restore(abstract)
    if os.path.dirname(path).endswith("7"):  # Orbax's own notes on time and versions, which are not read
        tiny.assert_trees_equal(got, new)
        assert not said
    else:
        tiny.assert_trees_equal(got, old)
        (line,) = said
        assert line.startswith("the checkpoint of step 7 is damaged (") and line.endswith("; going on from that of step 3")
        assert sorted(os.listdir(folder)) == ["3", "damaged-7"]
    checkpoints.save(7, new)
    checkpoints.close()
    again = Checkpoints(str(folder))
    tiny.assert_trees_equal(again.restore(abstract), new)
    again.close()


@pytest.mark.parametrize("name", ["a*", "b?", "[c]"])
def test_a_name_that_reads_as_a_pattern_is_refused(tmp_path, name):
    """Orbax would leave out what it has written there."""
    for write in (lambda path: save_params(path, tiny.draw(SPECS)), Checkpoints):
        with pytest.raises(UserError, match=r"holds one of \* \? \[, .*; choose another name"):
            write(str(tmp_path / name / "params"))
    assert os.listdir(tmp_path) == []


def test_if_all_are_damaged_there_is_none(saved, tmp_path):
    whole, abstract, *_ = saved
    folder, said = tmp_path / "checkpoints", []
    shutil.copytree(whole, folder)
    for step in ("3", "7"):
        os.remove(folder / step / "default" / "sha256.json")
    checkpoints = Checkpoints(str(folder), say=said.append)
    assert checkpoints.restore(abstract) is None
    checkpoints.close()
    assert len(said) == 2 and said[1].endswith("there is none before it, so the stage begins anew")


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    abstract, state = states(optax.adam(0.1))
    expected = jax.device_get(state)
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(1, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    jax.block_until_ready(overwrite(state))
    checkpoints.close()
    again = Checkpoints(str(tmp_path / "checkpoints"))
    tiny.assert_trees_equal(again.restore(abstract), expected)
    again.close()


@pytest.mark.parametrize("most", [3000, 40, 0])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, most):
    """What there is no room for may be numbers, notes of Orbax, or the seal."""
    specs = SPECS | {"noise": ParamSpec((40, 40), ("embed", "mlp"), std=1.0)}
    tx, words = optax.sgd(0.1), r": cannot be written \(File too large, [\d,.]+ MB are free there\); make room, and the same "
    abstract = abstract_state(specs, tx, None)
    state = init_state(tiny.draw(specs), tx, abstract)
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(1, state)
    checkpoints.wait()
    with tiny.no_room(most):
        with pytest.raises(UserError, match="checkpoints" + words) as error:
            checkpoints.save(2, state)
            checkpoints.wait()
        with pytest.raises(UserError, match="params" + words):
            save_params(str(tmp_path / "params"), state.params)
    assert "\n" not in str(error.value) and not (tmp_path / "params").exists()
    assert [name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()] == ["1"]
    again = Checkpoints(str(tmp_path / "checkpoints"))
    tiny.assert_trees_equal(again.restore(abstract), state)
    again.save(4, state)
    again.close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "4"]  # what was half written takes no room any more


def test_what_orbax_raises_for_other_reasons_stays_what_it_is():
    for error in (ValueError("shapes differ"), FileNotFoundError(2, "No such file")):
        with pytest.raises(type(error)), checkpoint._writing("nowhere"):
            raise error


def test_an_unfinished_save_does_not_count(tmp_path):
    abstract, state = states(optax.adam(0.1))
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(1, state)
    checkpoints.close()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0").mkdir()
    again = Checkpoints(str(tmp_path / "checkpoints"))
    tiny.assert_trees_equal(again.restore(abstract), state)
    again.close()


def test_delete(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "file").write_text("x")
    delete(str(folder))
    delete(str(folder))
    assert not folder.exists()
