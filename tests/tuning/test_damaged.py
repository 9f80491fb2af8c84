"""A damaged journal or mark of a study is one line that says where, and what can be saved."""

import optuna
import pytest

from cluster.records.run_folder import RunFolderError
from tuning.folder import StudyFolder
from tuning.storage import JOURNAL, open_journal


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The journal of three finished trials: two lines of the study, then begun, parameter, told."""
    folder = tmp_path_factory.mktemp("study")
    study = optuna.create_study(storage=open_journal(folder), study_name="s", direction="maximize")
    for value in (0.1, 0.2, 0.3):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, value)
    found = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(found) == 10
    return found


DAMAGE = {
    "cut in the middle": (4, lambda lines: [*lines[:4], lines[4][:25] + b"\n", *lines[5:]]),
    "zeros": (4, lambda lines: [*lines[:4], bytes(40) + b"\n", *lines[4:]]),
    "no object": (3, lambda lines: [*lines[:3], b"3\n", *lines[3:]]),
    "empty line": (3, lambda lines: [*lines[:3], b"\n", *lines[3:]]),
    "another operation": (5, lambda lines: [*lines[:5], b'{"op_code": 99}\n', *lines[5:]]),
    "no text": (0, lambda lines: [b"\xff\xfe\x00\n", *lines]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_journal_says_where_and_what_can_be_saved(case, lines, tmp_path):
    sound, damage = DAMAGE[case]
    (tmp_path / JOURNAL).write_bytes(b"".join(damage(lines)))
    told = rf"study.journal: line {sound + 1} is damaged .*keep the lines before it \(head -n {sound}\)"
    with pytest.raises(RunFolderError, match=told):
        open_journal(tmp_path)
    (tmp_path / JOURNAL).write_bytes(b"".join(damage(lines)[:sound]))  # the way on
    storage = open_journal(tmp_path)
    trials = [
        trial for study in storage.get_all_studies() for trial in storage.get_all_trials(study._study_id)
    ]
    assert len(trials) == max(0, sound - 1 + 2) // 3


@pytest.mark.parametrize("text", ["", "0123", "x" * 32, "0123456789abcdef0123456789abcdef\n\n"])
def test_a_damaged_mark_is_named(text, tmp_path):
    (tmp_path / "study-id").write_text(text)
    with pytest.raises(RunFolderError, match="study-id is damaged"):
        StudyFolder(tmp_path).mark()
