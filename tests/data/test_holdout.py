"""The holdout's file."""

from ica_plugin.data.loaders import json_error


def test_line_ends_of_unicode_inside_a_string_are_no_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "one\u2028two\u0085three"}\r\n{"a": 1}\n', encoding="utf-8")
    assert json_error(path) is None
    path.write_text('{"a": "one\u2028two"}\n{"a": \n', encoding="utf-8")
    assert json_error(path).startswith(f"{path}, line 2: ")
