"""The audit log, as tests read it while the API server writes it."""

from pathlib import Path

from harness.audit import audit_log_end, read_audit_log

FIRST = b'{"verb": "get", "requestURI": "/first"}\n'
SECOND = b'{"verb": "get", "requestURI": "/second"}\n'


def _append(log: Path, text: bytes) -> None:
    with log.open("ab") as stream:
        stream.write(text)


def test_a_record_that_is_being_written_is_read_once_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    log.touch()
    assert audit_log_end(log) == 0
    _append(log, FIRST[:9])
    assert audit_log_end(log) == 0
    assert read_audit_log(log) == []
    _append(log, FIRST[9:] + SECOND[:9])
    since = audit_log_end(log)
    assert [each.request_uri for each in read_audit_log(log)] == ["/first"]
    assert read_audit_log(log, since) == []
    _append(log, SECOND[9:])
    assert [each.request_uri for each in read_audit_log(log, since)] == ["/second"]
