"""teacher.json in a run folder: which model behind a URL the run learns from, to its end."""

import json
from dataclasses import asdict
from pathlib import Path

from kdrl_train.model.teacher.client import TeacherClient, TeacherError


def require_same_teacher(folder: Path, client: TeacherClient) -> None:
    """Note what a run's first server says of its model; a resumed run must meet the same one, at
    whatever URL.

    Raises: TeacherError where it is another.
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
            f"{k}: {before.get(k)} there, {now[k]} now" for k in now if before.get(k) != now[k]
        ]
        raise TeacherError(
            f"the teacher at {client.url} must be that of {path}, got another ("
            f"{'; '.join(changed)}): serve that model again, or start a new run with another --out"
        )
