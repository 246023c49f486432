"""Keeps in a run folder's teacher.json which model behind a URL the run learns from."""

import json
from dataclasses import asdict
from pathlib import Path

from kdrl_train.model.teacher.client import TeacherClient, TeacherError


def require_same_teacher(folder: Path, client: TeacherClient) -> None:
    """Write what the first server of a run says of its model, or compare it with what is written.

    A resumed run must learn from the same model, at whatever URL.

    Raises: TeacherError where it is another one.
    """
    path, now = folder / "teacher.json", asdict(client.info)
    if not path.exists():
        work = path.with_name(f".{path.name}.tmp")
        work.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        work.replace(path)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if now != before:
        changed = [
            f"{k}: {before.get(k)} in the file, {now[k]} now"
            for k in now
            if before.get(k) != now[k]
        ]
        raise TeacherError(
            f"the teacher at {client.url} must be that of {path}, got another one ("
            f"{'; '.join(changed)}): serve that model again, or start a new run with another --out"
        )
