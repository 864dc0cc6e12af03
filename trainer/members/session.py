"""The session of an elastic run: name and key by which its ranks know each other, in the run's folder.

    OUTPUT/elastic/session.json     of the present session, readable by its owner alone
    OUTPUT/elastic/SESSION/         one file per generation of ranks (agreement.py)

Who may read the file may join. A session begins with the first rank of a start and ends with the run, or when
all of its ranks are lost.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import NamedTuple

from foldfeed.trainer.errors import TrainerError

FOLDER = "elastic"
FILE = "session.json"


class Session(NamedTuple):
    """What ranks know together; all empty where there is no session yet.

    Attributes:
      name: of its folder.
      key: by which they greet each other.
      launch: of the launcher that began the run, if one did.
      lease: token of the run's lease, for whoever is to write.
    """

    name: str = ""
    key: bytes = b""
    launch: str = ""
    lease: str = ""


def new_session(output: Path, launch: str, lease: str) -> Session:
    """Makes the folder of a new session, which nobody can find before `publish`; removes older ones."""
    session = Session(secrets.token_hex(8), secrets.token_bytes(32), launch, lease)
    # First, so that whoever finds its folder gone also finds that the session is not that one any more.
    (output / FOLDER / FILE).unlink(missing_ok=True)
    shutil.rmtree(output / FOLDER, ignore_errors=True)
    folder_of(output, session).mkdir(mode=0o700, parents=True)
    return session


def folder_of(output: Path, session: Session) -> Path:
    """Returns where a session's generations are decided."""
    return output / FOLDER / session.name


def publish(output: Path, session: Session) -> None:
    """Lets others find the session."""
    temporary = output / FOLDER / f".{FILE}"
    number = os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        found = {"session": session.name, "key": session.key.hex()}
        json.dump({**found, "launch": session.launch, "lease": session.lease}, file)
    temporary.replace(output / FOLDER / FILE)


def read_session(output: Path) -> Session:
    """Returns the session that lives in a run's folder; an empty one where there is none yet.

    Raises:
      TrainerError: the file cannot be read.
    """
    path = output / FOLDER / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        told = (str(found.get(name, "")) for name in ("launch", "lease"))
        return Session(str(found["session"]), bytes.fromhex(found["key"]), *told)
    except FileNotFoundError:
        return Session()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainerError(
            f"{path} cannot be read: {error!r}. Remove it, if no rank of the run lives any more"
        ) from error
