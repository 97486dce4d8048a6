"""`verify`: a project or a run that was copied, before it is worked on or the original deleted."""

from __future__ import annotations

import shutil

import pytest

from retro_mcore.checkpoint.checksums import checksums_of_share, write_checksums
from retro_mcore.cli import build_db, build_index, verify
from retro_mcore.project.verification import compare_sizes
from retro_mcore.stages.doctor import checkup
from tests.unit.data.projects import built_project


@pytest.fixture
def project(tmp_path):
    return shutil.copytree(built_project(), tmp_path / "project")


@pytest.fixture
def run(tmp_path):
    for number in (1, 2, 3):
        checkpoint = tmp_path / "run" / f"iter_{number:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "__0_0.distcp").write_bytes(bytes(number))
        if number > 1:
            write_checksums(checkpoint, [checksums_of_share(checkpoint)])
    return tmp_path / "run"


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def test_linked_folders_are_part_of_the_project(capsys, project):
    """Whose disk is small keeps the index on another one, behind a link."""
    elsewhere = shutil.move(project / "index", project.parent / "elsewhere")
    (project / "index").symlink_to(elsewhere)
    (project / "index" / "again").symlink_to(project)  # a cycle
    damaged = next(project.parent.glob("elsewhere/*/*/added*.faissindex"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert verify.main(["--project-dir", str(project)]) == 2
    (line,) = errors(capsys)
    assert damaged.name in line


def test_files_that_a_copy_left_out_are_missing(capsys, project):
    lost = next((project / "query").glob("train_*/*.hdf5"))
    lost.unlink()
    assert verify.main(["--project-dir", str(project)]) == 2
    (line,) = errors(capsys)
    assert f"{lost}: is missing" in line
    # The stage that would have made it did not finish.
    (project / "stages" / "query_neighbors.json").unlink()
    assert verify.main(["--project-dir", str(project)]) == 0


def test_what_is_whole_is_counted(capsys, project, run):
    result = verify.verify(verify.VerifyOptions(str(project), str(run)))
    assert result.num_files == len(list(project.rglob("*.done")))
    assert result.checkpoints == ["iter_0000002", "iter_0000003"]
    assert result.without_checksums == ["iter_0000001"]
    assert "not compared" in capsys.readouterr().out


def test_the_counts_of_the_database_are_compared(capsys, project):
    """A digit of indexed_dataset_infos.json decides which chunks the index is trained on."""
    damaged = project / "db" / "indexed_dataset_infos.json"
    text = damaged.read_text()
    damaged.write_text(text.replace('"n_chunks_sampled": ', '"n_chunks_sampled":\t'))
    assert verify.main(["--project-dir", str(project)]) == 2
    (line,) = errors(capsys)
    assert f"{damaged}: its bytes differ" in line
    assert build_index.main(["--project-dir", str(project)]) == 2
    assert f"{damaged}: its bytes differ" in errors(capsys)[0]
    assert build_db.main(["--project-dir", str(project), "--retro-doc-block-size", "6"]) == 0
    assert damaged.read_text() == text


def test_every_file_with_a_checksum_is_compared(capsys, project, run):
    damaged = [marker.with_suffix("") for marker in sorted(project.rglob("*.done"))]
    for path in damaged:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert verify.main(["--project-dir", str(project)]) == 2
    told = errors(capsys)
    assert [any(f" {path}: " in line for line in told) for path in damaged] == [True] * len(damaged)
    (run / "iter_0000003" / "__0_0.distcp").write_bytes(b"\1\0\0")
    assert verify.main(["--load", str(run)]) == 2
    (line,) = errors(capsys)
    assert str(run / "iter_0000003" / "__0_0.distcp") in line


@pytest.mark.parametrize("flags", [[], ["--load", "nowhere"], ["--project-dir", "nowhere"]])
def test_nothing_to_verify(capsys, flags):
    assert verify.main(flags) == 2
    assert len(errors(capsys)) == 1


def test_sizes_are_compared_without_reading(project):
    """As `doctor` does."""
    assert compare_sizes(project) == len(list(project.rglob("*.done")))
    file = next(project.glob("index/*/*/added*.faissindex"))
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    assert compare_sizes(project)  # as long as before
    file.write_bytes(content[:-1])
    (wrong,) = checkup._project(str(project))
    assert (wrong.level, wrong.subject) == ("error", str(file))
    assert checkup._project(str(project.parent))[0].level == "note"
