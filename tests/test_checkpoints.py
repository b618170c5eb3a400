"""Checkpoints: whole or ignored, one process a key, and a killed training that ends as if nothing had happened."""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from catdog.checkpoints import DAYS_KEPT, Checkpoints, State, open_checkpoints, run_key
from conftest import MODULES, Project

STATE = State(
    {
        "best": [np.arange(6, dtype=np.float32).reshape(2, 3)],
        "current": [np.array([7, 8], np.uint32), np.float32(0.1) * np.ones(3, np.float32), np.array(5)],
    },
    {"rows": [{"val_loss": 0.1 + 0.2}], "wait": 2},
)


def test_state_comes_back_bit_by_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "key")
    assert checkpoints.load("head") is None
    checkpoints.save("head", STATE)
    found = checkpoints.load("head")
    assert found.meta == STATE.meta
    assert list(found.arrays) == ["best", "current"]
    for group, values in STATE.arrays.items():
        for one, other in zip(found.arrays[group], values, strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(one, other)
    assert checkpoints.load("fine_tune") is None
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["head.npz"]


def test_many_variables_keep_their_order(tmp_path):
    values = [np.full(3, number) for number in range(1200)]
    Checkpoints(tmp_path).save("head", State({"current": values}, {}))
    assert np.array_equal(Checkpoints(tmp_path).load("head").arrays["current"], values)


@pytest.mark.parametrize("damage", ["half", "empty", "byte", "text"])
def test_damaged_file_is_ignored_with_a_line(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("head", STATE)
    path = tmp_path / "head.npz"
    content = path.read_bytes()
    middle = content.index(np.arange(6, dtype=np.float32).tobytes())
    path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "empty": b"",
            "byte": content[:middle] + b"\xff" + content[middle + 1 :],
            "text": b"no archive",
        }[damage]
    )
    assert checkpoints.load("head") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "head.npz is damaged" in lines[0]


def test_failed_write_keeps_the_former_file(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("head", STATE)
    with pytest.raises(TypeError):
        checkpoints.save("head", State({}, {"not JSON": object()}))
    assert checkpoints.load("head").meta == STATE.meta
    assert [path.name for path in tmp_path.iterdir()] == ["head.npz"]


def test_due_only_now_and_then(tmp_path):
    assert not Checkpoints(tmp_path).due()  # ten seconds have not passed
    eager = Checkpoints(tmp_path, seconds_between=0.05)
    time.sleep(0.06)
    assert eager.due()
    eager.save("head", STATE)
    assert not eager.due()


def test_none_is_kept_without_a_folder():
    nowhere = Checkpoints(None, seconds_between=0)
    assert not nowhere.due()
    nowhere.save("head", STATE)
    assert nowhere.load("head") is None
    nowhere.clear()


def folder(root: Path) -> Path:
    return root / ".dvc" / "tmp" / "checkpoints"


def test_success_leaves_nothing_and_failure_the_checkpoint(tmp_path):
    with pytest.raises(RuntimeError), open_checkpoints(tmp_path, "key") as checkpoints:
        checkpoints.save("head", STATE)
        raise RuntimeError
    with open_checkpoints(tmp_path, "other") as checkpoints:
        assert checkpoints.load("head") is None
    with open_checkpoints(tmp_path, "key") as checkpoints:
        assert checkpoints.load("head").meta == STATE.meta
        checkpoints.clear()
    assert list(folder(tmp_path).iterdir()) == []


def test_second_process_keeps_none_and_says_so(tmp_path, capsys):
    with open_checkpoints(tmp_path, "key") as first:
        first.save("head", STATE)
        with open_checkpoints(tmp_path, "key") as second:
            assert "another process" in capsys.readouterr().err
            assert second.load("head") is None
            second.save("head", State({}, {"mine": 1}))
            second.clear()
        with open_checkpoints(tmp_path, "other") as other:
            other.save("head", STATE)
            assert other.load("head") is not None
        assert first.load("head").meta == STATE.meta
    assert capsys.readouterr().err == ""


def test_forgotten_checkpoints_are_deleted(tmp_path):
    for key, days in (("old", DAYS_KEPT + 1), ("new", DAYS_KEPT - 1)):
        with open_checkpoints(tmp_path, key) as checkpoints:
            checkpoints.save("head", STATE)
        then = time.time() - days * 24 * 3600
        for path in (folder(tmp_path) / key, folder(tmp_path) / key / "head.npz", folder(tmp_path) / f"{key}.lock"):
            os.utime(path, (then, then))
    with open_checkpoints(tmp_path, "another"):
        pass
    assert sorted(path.name for path in folder(tmp_path).iterdir()) == ["new", "new.lock"]


def test_key_tells_parameters_and_code_apart(tmp_path):
    code = [tmp_path / "a.py", tmp_path / "b.py"]
    for path in code:
        path.write_text("x = 1\n")
    key = run_key({"a": 1, "b": [2.5]}, code)
    assert key == run_key({"b": [2.5], "a": 1}, code[::-1])
    assert key != run_key({"a": 1, "b": [2.6]}, code)
    code[1].write_text("x = 2\n")
    assert key != run_key({"a": 1, "b": [2.5]}, code)


HEAD_EPOCHS, TUNE_EPOCHS = 60, 12


def train_all(place: str) -> None:
    """Fits a head and fine-tunes, with everything that draws numbers or averages; what a killed process runs."""
    import tiny
    from catdog.fine_tuning import fine_tune
    from catdog.model import ModelInfo, save_model
    from catdog.training import fit_head

    checkpoints = Checkpoints(Path(place, "checkpoints"), seconds_between=0)
    data = tiny.Data(Path(place))
    draws = {"dropout": 0.4, "mixup": 0.3, "ema": 0.9, "learning_rate": 0.003}
    params = tiny.train_params(epochs=HEAD_EPOCHS, patience=HEAD_EPOCHS, **draws)
    model, network, head = tiny.model(params)
    train, val = (data.features(network, split) for split in ("train", "val"))
    histories = [fit_head(head, train, val, params, seed=1, checkpoints=checkpoints)]
    tune = tiny.fine_tune_params(epochs=TUNE_EPOCHS, patience=TUNE_EPOCHS, cutmix=1.0)
    parts = ([network], [tiny.BACKBONE], data.images("train"), data.images("val"))
    tuned = fine_tune(model, *parts, tune, params, tiny.AUGMENT, seed=1, checkpoints=checkpoints)
    histories.append(tuned.history)
    info = ModelInfo(("a", "b"), tiny.SIZE, "pad", 95, "tiny", "random", "avg")
    save_model(model, info, Path(place, "model.keras"))
    Path(place, "history.json").write_text(json.dumps([table.to_csv() for table in histories]))


def test_killed_training_ends_with_the_same_bytes(workshop, tmp_path):
    """SIGKILL in the head's phase and in fine-tuning; afterwards model and histories are those of a quiet run."""

    def start(place: Path) -> subprocess.Popen:
        place.mkdir(exist_ok=True)
        code = f"import test_checkpoints; test_checkpoints.train_all({str(place)!r})"
        return Project(place, workshop.home, warm=True).start("python", "-c", code, PYTHONPATH=MODULES)

    quiet = start(tmp_path / "quiet")
    place = tmp_path / "killed"
    rng = np.random.default_rng()
    told = []
    for phase in ("head", "fine_tune"):
        process = start(place)
        checkpoint = place / "checkpoints" / f"{phase}.npz"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        told.append(process.communicate()[1])
        assert process.returncode == -signal.SIGKILL, told
        assert not (place / "model.keras").exists()
    last = start(place)
    told.append(last.communicate()[1])
    assert last.returncode == 0, told
    quiet_told = quiet.communicate()[1]
    assert quiet.returncode == 0, quiet_told
    assert "going on" not in quiet_told
    assert f"going on with head after epoch {HEAD_EPOCHS}," not in told[1]
    assert "going on with head after epoch " in told[1]
    assert f"going on with head after epoch {HEAD_EPOCHS}," in told[2]
    assert "going on with fine_tune after epoch " in told[2]
    assert f"going on with fine_tune after epoch {TUNE_EPOCHS}," not in told[2]
    for name in ("history.json", "model.keras"):
        hashes = {hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (tmp_path / "quiet", place)}
        assert len(hashes) == 1, name
