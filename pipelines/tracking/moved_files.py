"""Find the files of runs where a project's folder has moved: MLflow's database holds their absolute paths."""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ARTIFACTS = "mlartifacts"  # the folder beside a database that has the files of its runs

# Where MLflow's database holds the place of files.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)


def local_folder(location: str) -> Path | None:
    """Return the folder of an MLflow location that is on this machine; None for one that is elsewhere."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def follow_moved_files(database: Path) -> None:
    """Write into a database where its files are now, if they have moved together with it.

    So all that reads or writes them goes on: commands, continued runs, MLflow's page. Locations that are not in a
    folder `mlartifacts`, those of an experiment that has no folder beside the database, and those of files that have
    not come along stay.
    """
    beside = (database.parent / ARTIFACTS).as_uri()
    with closing(sqlite3.connect(database)) as connection, connection:
        for (before,) in connection.execute("SELECT artifact_location FROM experiments").fetchall():
            root, _, name = (before or "").rpartition(f"/{ARTIFACTS}/")
            now = f"{beside}/{name}"
            if not root.startswith("file:") or now == before or not is_there(now):
                continue
            for table, column in PLACES:
                rows = connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
                for row, old in rows:
                    if old != before and not (old or "").startswith(f"{before}/"):
                        continue
                    new = now + old.removeprefix(before)
                    if is_there(new) or not is_there(old):
                        connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))


def is_there(location: str) -> bool:
    """Whether the folder of a location is there; of one that is elsewhere nobody knows before it is asked."""
    folder = local_folder(location)
    return folder is None or folder.is_dir()
