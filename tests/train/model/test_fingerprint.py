"""fingerprint: another teacher of the same name and size is told apart, a copy is not."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdrl_train.config import TrainConfig
from kdrl_train.model import fingerprint
from kdrl_train.model.fingerprint import weights_hash
from kdrl_train.model.teacher.client import TeacherError, TeacherInfo
from kdrl_train.model.teacher.identity import check_same_teacher, keep_teacher
from kdrl_train.start.teacher_server import hash_here
from kdrl_train.train import main


def change_one_weight(folder: Path) -> None:
    """Give one weight another last bit, and the file the time that it had."""
    path = folder / "model.safetensors"
    stat = path.stat()
    tensors = load_file(path)
    tensors["lm_head.weight"].view(torch.int32)[0, 0] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


@pytest.fixture
def teacher(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["teacher"], tmp_path / "teacher")


@pytest.mark.fault("another teacher")
def test_one_bit_of_a_weight_changes_the_hash_and_a_copy_does_not(
    teacher: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fingerprint, "CACHED_BYTES", 0)
    monkeypatch.setattr(fingerprint, "CACHE", tmp_path / "cache" / "hashes.json")
    first = weights_hash(str(teacher))
    assert first == weights_hash(str(folders["teacher"]))
    assert len(first or "") == 64
    assert weights_hash(str(teacher)) == first  # from the cache
    change_one_weight(teacher)
    assert weights_hash(str(teacher)) != first


@pytest.mark.fault("another teacher")
def test_another_setting_changes_the_hash(teacher: Path) -> None:
    first, config = weights_hash(str(teacher)), teacher / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "utf-8")
    assert weights_hash(str(teacher)) != first
    assert text != config.read_text(encoding="utf-8")
    noted = text.replace("{", '{"transformers_version": "1.2.3", "_name_or_path": "x",', 1)
    config.write_text(noted.replace('"transformers_version": "5', '"_name_or_path": "5'), "utf-8")
    assert weights_hash(str(teacher)) == first


def test_the_cache_is_read_and_may_be_damaged_or_refused(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "hashes.json"
    monkeypatch.setattr(fingerprint, "CACHED_BYTES", 0)
    monkeypatch.setattr(fingerprint, "CACHE", cache)
    first = weights_hash(str(teacher))
    assert str(teacher / "model.safetensors") in cache.read_text(encoding="utf-8")
    reads: list[object] = []
    digest = fingerprint.hashlib.file_digest
    monkeypatch.setattr(
        fingerprint.hashlib, "file_digest", lambda *a: reads.append(0) or digest(*a)
    )
    assert weights_hash(str(teacher)) == first
    assert reads == []
    for damaged in ("", "[1]", '{"%s": 3}' % (teacher / "model.safetensors")):
        cache.write_text(damaged, encoding="utf-8")
        assert weights_hash(str(teacher)) == first
    assert len(reads) == 3
    monkeypatch.setattr(fingerprint, "CACHE", teacher / "config.json" / "hashes.json")  # no folder
    assert weights_hash(str(teacher)) == first


@pytest.mark.fault("another teacher")
def test_a_run_keeps_its_teacher_and_says_what_it_cannot_compare(tmp_path: Path) -> None:
    info = TeacherInfo(model="a", window=9, vocab_size=5, weights="w", fingerprint="f")
    assert "does not say which teacher" in check_same_teacher(tmp_path, info)[0]
    keep_teacher(tmp_path, replace(info, weights=None))
    assert "cannot be compared" in check_same_teacher(tmp_path, info)[0]
    with pytest.raises(TeacherError, match="model: a in the file, b now"):
        check_same_teacher(tmp_path, replace(info, model="b"))  # no weights, so the name counts
    keep_teacher(tmp_path, info)
    keep_teacher(tmp_path, replace(info, weights="other"))
    assert check_same_teacher(tmp_path, replace(info, model="b", fingerprint="g")) == []
    for changed in ({"weights": "v"}, {"window": 8}, {"vocab_size": None}):
        with pytest.raises(TeacherError, match=f"{next(iter(changed))}: .* in the file, "):
            check_same_teacher(tmp_path, replace(info, **changed))
    of_vllm = TeacherInfo(model="a", window=9, root="/a")
    keep_teacher(tmp_path, of_vllm, "vllm")
    assert "cannot be compared" in check_same_teacher(tmp_path, of_vllm, "vllm")[0]
    with pytest.raises(TeacherError, match="root: /a in the file, /b now"):
        check_same_teacher(tmp_path, replace(of_vllm, root="/b"), "vllm")
    probed = replace(of_vllm, probe_ids=[[1, 2, 3], [4, 5]], probe_logprobs=[[-1.0, -2.0], [-3.0]])
    keep_teacher(tmp_path, probed, "probed")
    near, far = ([[-1.0, -2.0 - by], [-3.0]] for by in (0.03, 0.3))
    (doubt,) = check_same_teacher(tmp_path, replace(probed, probe_logprobs=near), "probed")
    assert doubt.endswith("of a few prompts differ by 0.01 nats on average")
    with pytest.raises(TeacherError, match=r"of a few prompts, by 0\.1 nats on average"):
        check_same_teacher(tmp_path, replace(probed, probe_logprobs=far), "probed")
    others = replace(probed, probe_ids=[[1, 2, 9], [4, 5]], probe_logprobs=far)
    assert "differ" not in check_same_teacher(tmp_path, others, "probed")[0]
    for damaged in ("{", "{}", '{"model": "a", "window": 9, "colour": 1}'):
        (tmp_path / "teacher.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(TeacherError, match="must describe a teacher, got"):
            check_same_teacher(tmp_path, info)


@pytest.mark.fault("another teacher")
def test_a_teacher_of_vllm_may_move(tmp_path: Path) -> None:
    """Its server says a path, by which the same model in another folder was refused."""
    first = TeacherInfo(
        model="/a", window=9, root="/a", probe_ids=[[1, 2]], probe_logprobs=[[-1.0]]
    )
    moved = replace(first, model="b", root="/b")
    keep_teacher(tmp_path, first)
    (doubt,) = check_same_teacher(tmp_path, moved)
    assert "; it was /a then, and is b from /b now; its log-probabilities of a few" in doubt
    other = replace(moved, probe_logprobs=[[-1.01]])
    message = r"root: /a in the file, /b now; its log-probabilities .*, by 0\.01 nats on average"
    with pytest.raises(TeacherError, match=message):
        check_same_teacher(tmp_path, other)
    keep_teacher(tmp_path, replace(other, files="hash"))  # a later start sees the files
    assert check_same_teacher(tmp_path, replace(other, files="hash")) == []
    with pytest.raises(TeacherError, match="files: hash in the file, another now"):
        check_same_teacher(tmp_path, replace(first, files="another"))
    far = replace(moved, files="hash", probe_logprobs=[[-1.5]])  # the files are not the server's
    with pytest.raises(TeacherError, match=r"few prompts, by 0\.5 nats on average"):
        check_same_teacher(tmp_path, far)


def test_a_served_folder_is_hashed_where_it_is_here(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(teacher.parent)
    assert hash_here(str(teacher)) == weights_hash(str(teacher))
    for root in (None, "teacher", str(tmp_path / "absent"), str(tmp_path)):
        assert hash_here(root) is None


@pytest.mark.slow
@pytest.mark.fault("another teacher")
def test_a_resumed_run_takes_a_copy_of_its_teacher_and_no_other(
    config: Callable[..., TrainConfig], teacher: Path, tmp_path: Path
) -> None:
    settings = config(steps=1)
    settings = replace(settings, model=replace(settings.model, teacher=str(teacher)))
    main(settings)
    moved = teacher.rename(tmp_path / "moved")
    more = replace(settings.model, teacher=str(moved))
    main(replace(settings, model=more, resume=True, steps=2))
    change_one_weight(moved)
    written = (settings.out / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(TeacherError, match=r"got another one \(weights: \w+ in the file"):
        main(replace(settings, model=more, resume=True, steps=3))
    assert (settings.out / "config.yaml").read_text(encoding="utf-8") == written
