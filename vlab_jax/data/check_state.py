"""What a check knows so far, in an SQLite file: memory does not grow with the data set, and a killed check goes on.

It holds the list of media (`builders.media`), a row for each clip, a hash of each caption, and what opening each media
file has shown. The last is kept from one check to the next, for files that have not changed since.
"""

import itertools
import json
import pathlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vlab_jax.data.builders.annotation import SPLITS, Entry, Tally
from vlab_jax.data.builders.media import Media, MediaIndex
from vlab_jax.data.probing import Probed, hash64
from vlab_jax.errors import InputError

_AT_ONCE = 10_000

_TABLES = """
CREATE TABLE IF NOT EXISTS known (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS clip (
    split INTEGER, id TEXT, video TEXT, media INTEGER, start REAL, stop REAL, problem TEXT, texts INTEGER);
CREATE TABLE IF NOT EXISTS caption (hash INTEGER, split INTEGER);
CREATE TABLE IF NOT EXISTS probe (
    path TEXT PRIMARY KEY, size INTEGER, time INTEGER, duration REAL, content INTEGER, error TEXT) WITHOUT ROWID;
"""
# Clips with what is known of their media.
_SEEN = """
CREATE INDEX IF NOT EXISTS clip_media ON clip (media);
CREATE TEMP VIEW IF NOT EXISTS seen AS
    SELECT split, id, video, shown || '/' || stem || suffix AS path, start, stop, problem, texts,
        media.size, duration, error, content
    FROM clip
    LEFT JOIN media ON media.number = clip.media
    LEFT JOIN directory ON directory.number = media.directory
    LEFT JOIN probe ON probe.path = shown || '/' || stem || suffix
        AND probe.size = media.size AND probe.time = media.time;
"""
# All that is found out anew by the next check; at once, since a process can be killed between two statements.
_FORGET = """
BEGIN;
DROP TABLE IF EXISTS clip;
DROP TABLE IF EXISTS caption;
DROP TABLE IF EXISTS media;
DROP TABLE IF EXISTS directory;
DELETE FROM known;
COMMIT;
"""


class CheckState:
    """The state of a check in a file.

    Args:
      path: of the file, made if it is missing.
      sources: what the check is of, in words; the file of a check of something else is started afresh.
      folders: where the media lie.

    Attributes:
      path: as given.
      index: the media.
      resumed: whether an earlier check was killed, and this one goes on.
    """

    def __init__(self, path: pathlib.Path, sources: str, folders: Sequence[pathlib.Path]) -> None:
        self.path = path
        try:
            self.database = sqlite3.connect(path, timeout=1.0)
            self.database.execute("PRAGMA locking_mode = EXCLUSIVE")
            # A process that is killed loses nothing that was committed; only a power failure might.
            self.database.execute("PRAGMA synchronous = OFF")
            self.database.execute("PRAGMA cache_size = -32000")  # KiB
            self.database.executescript(_TABLES)
            self.index = MediaIndex(folders, self.database)
            begun = self._known("sources") == sources and self._known("finished") is None
            self.resumed = begun and not self.index.changed()
            if not self.resumed:
                self.database.executescript(_FORGET + _TABLES)
                self.index = MediaIndex(folders, self.database)
                self._note("sources", sources)
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{path}, where the check notes how far it is, cannot be used ({error}); end the check that has it "
                "open, or delete it"
            ) from error

    def read(self, split: str, entries: Callable[[], Iterator[Entry]], update: Callable[[int], object]) -> Tally:
        """Notes the entries of a split that are not noted yet, with their media; returns the counts of all.

        Args:
          entries: makes them, from the first on.
          update: told how many more are noted.
        """
        number, tally = SPLITS.index(split), Tally()
        saved = json.loads(self._known(f"counts {split}") or "{}")
        tally.counts |= saved
        done = tally.counts["clips"]
        update(done)
        for some in _chunks(itertools.islice(entries(), done, None)):
            self._add(number, some, tally)
            self._note(f"counts {split}", json.dumps(tally.counts))
            update(len(some))
        query = "SELECT count(DISTINCT video) FROM clip WHERE split = ?"
        (tally.counts["videos"],) = self.database.execute(query, (number,)).fetchone()
        return tally

    def _add(self, split: int, entries: Sequence[Entry], tally: Tally) -> None:
        clips, captions = [], []
        for entry in entries:
            tally.add(entry)
            media, problem = self._media(entry)
            texts = len(entry.captions) + len(entry.questions)
            clips.append((split, entry.id, entry.video, media, entry.start, entry.end, problem, texts))
            captions += [(hash64(" ".join(text.lower().split()).encode()), split) for text in entry.captions]
        self.database.executemany("INSERT INTO clip VALUES (?, ?, ?, ?, ?, ?, ?, ?)", clips)
        self.database.executemany("INSERT INTO caption VALUES (?, ?)", captions)

    def _media(self, entry: Entry) -> tuple[int | None, str | None]:
        try:
            media = self.index.find(entry.video, *entry.aliases)
        except InputError as error:
            return None, str(error)
        return media.number if media else None, None

    def join(self) -> None:
        """To be called when all entries are noted."""
        self.database.executescript(_SEEN)
        self.database.commit()

    def rows(self, query: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query on the tables and on `seen`; a statement that has none is carried out at once."""
        return self.database.execute(query)

    def seen(self) -> Iterator[tuple[Any, ...]]:
        """Of each clip: split, id, video, path of its media, interval, problem, texts; bytes, seconds and error of its
        media, as far as they are known."""
        return self.rows("SELECT split, id, video, path, start, stop, problem, texts, size, duration, error FROM seen")

    def unprobed(self, share: float) -> Iterator[Media]:
        """The media of clips that are not empty and not opened yet, or a share of them, chosen by number."""
        last = -1
        while True:
            rows = self.database.execute(
                "SELECT number FROM media WHERE number > ? AND size > 0 AND (number * 2654435761) % 1000003 < ? "
                "AND EXISTS (SELECT 1 FROM clip WHERE clip.media = media.number) ORDER BY number LIMIT 1000",
                (last, share * 1_000_003),
            ).fetchall()
            if not rows:
                return
            for (last,) in rows:
                media = self.index[last]
                query = "SELECT 1 FROM probe WHERE path = ? AND size = ? AND time = ?"
                if not self.database.execute(query, (media.path, media.size, media.time)).fetchone():
                    yield media

    def note_probes(self, probed: Iterable[tuple[Media, Probed]]) -> None:
        """Notes what opening files has shown."""
        self.database.executemany(
            "INSERT OR REPLACE INTO probe VALUES (?, ?, ?, ?, ?, ?)",
            [(m.path, m.size, m.time, p.duration, p.content, p.error) for m, p in probed],
        )
        self.database.commit()

    def finish(self) -> None:
        """The next check starts afresh, but for what opening the files has shown."""
        self._note("finished", "yes")

    def close(self) -> None:
        """Lets others use the file."""
        self.database.close()

    def _known(self, key: str) -> Any:
        row = self.database.execute("SELECT value FROM known WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def _note(self, key: str, value: str) -> None:
        self.database.execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (key, value))
        self.database.commit()


def _chunks(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while some := list(itertools.islice(entries, _AT_ONCE)):
        yield some
