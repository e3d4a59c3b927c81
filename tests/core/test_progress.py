from ditopt import progress


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.terminal_progress() as report:
        for step in range(20):
            now[0] = float(step)
            report("profile", step, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["profile: 5 of 20", "profile: 10 of 20", "profile: 15 of 20"]


def test_a_terminal_gets_bars_that_vanish(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.terminal_progress() as report:
        report("profile", 1, 20)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "profile" in captured.err


def test_silence(capsys):
    progress.silent("profile", 1, 2)
    assert capsys.readouterr() == ("", "")
