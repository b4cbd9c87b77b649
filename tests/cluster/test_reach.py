"""What a node says when it does not see what the driver sees."""

from pathlib import Path

from cluster.reach import Question, answer


def test_a_node_that_sees_everything(tmp_path: Path) -> None:
    question = Question.ask({"cache.url": str(tmp_path / "cache")}, {"the teacher": str(tmp_path)})
    assert answer(question, "n1") == []
    assert len(list((tmp_path / "cache").iterdir())) == 2
    question.clear(["n1"])
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_of_the_same_name_on_another_disk(tmp_path: Path) -> None:
    question = Question.ask({"--run-dir": str(tmp_path / "run")}, {})
    # The node's own disk: the same path without the driver's object.
    (tmp_path / "run" / question.key("asked")).unlink()
    (problem,) = answer(question, "n1")
    assert problem.startswith(f"--run-dir {tmp_path / 'run'} is another place there") and "share" in problem
    assert not list((tmp_path / "run").iterdir())


def test_a_store_that_refuses_and_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    question = Question.ask({"cache.url": str(tmp_path / "cache")}, {})
    blocked = Question(question.mark, {"cache.url": str(tmp_path / "file" / "cache")}, {"the teacher": "/no/teacher"})
    (tmp_path / "file").write_text("")
    missing, refused = answer(blocked, "n1")
    assert (
        missing == "the teacher /no/teacher is not there; put it on every node, or on an object store or hub that "
        "all reach"
    )
    assert refused.startswith("cache.url")
