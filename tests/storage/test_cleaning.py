"""HTML, Unicode, terms, duplicates and the held-out draw."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.cleaning import (
    clean_document,
    cleaner_of,
    document_digest,
    is_heldout,
    normalise,
    strip_html,
    term_mapper,
)
from storage.config import CleaningConfig
from storage.corpus import Document
from storage.errors import InputError


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<p>One</p><p>Two</p>", "One\n\nTwo"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("fish &amp; chips &lt;3 &#x4E16;&#30028; &nbsp;x", "fish & chips <3 世界 x"),
        ("x<script>if (a < b) { alert('<p>no</p>') }</script>y<style>p { color: red }</style>z", "xyz"),
        ("x<!-- hidden --><![CDATA[ also ]]>y", "xy"),
        ("<b>bold</b> and <i>it</i>alic", "bold and italic"),
        ("many     spaces\n\tand\nlines", "many spaces and lines"),
        ("<div>\n  <div>  inner  </div>\n</div>after", "inner\n\nafter"),
        ("<pre>def f():\n    return  1</pre>", "def f():\n    return  1"),
        ("<ul><li>one<li>two</ul>", "one\n\ntwo".replace("\n\n", "\n")),
        ("<tr><td>1</td><td>2</td></tr>", "1 2"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("<script>never closed", ""),
        ("", ""),
    ],
)
def test_strip_html_leaves_the_visible_text(markup: str, text: str) -> None:
    assert strip_html(markup) == text


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=80))
def test_escaped_text_comes_back(text: str) -> None:
    assert strip_html(f"<p>{html.escape(text)}</p>").split() == text.split()


def test_normalise_makes_compatible_forms_plain() -> None:
    assert normalise("ﬁne Ａ１ ²") == "fine A1 2"


def test_terms_are_replaced_whole_longest_first_and_once() -> None:
    terms = {
        "concrete": "混凝土",
        "reinforced concrete": "钢筋混凝土",
        "concrete mixer": "搅拌机",
        "混凝土": "beton",
        "C++": "cpp",
    }
    replace = term_mapper(terms)
    assert replace("concrete, concretely: reinforced concrete.") == "混凝土, concretely: 钢筋混凝土."
    assert replace("concrete mixer, concrete mixers") == "搅拌机, 混凝土 mixers"
    assert replace("混凝土") == "beton"
    assert replace("C++11 and xC++") == "cpp11 and xC++"
    assert replace("用concrete做的") == "用混凝土做的"
    assert replace("éconcrete Concrete") == "éconcrete Concrete"


def test_swapped_terms_do_not_feed_each_other() -> None:
    assert term_mapper({"a": "b", "b": "a"})("a b ab") == "b a ab"


def test_an_empty_term_is_refused() -> None:
    with pytest.raises(InputError, match="empty term"):
        cleaner_of(CleaningConfig(term_map={"": "x"}))


def test_steps_run_in_the_order_of_the_config() -> None:
    clean = cleaner_of(CleaningConfig(strip_html=True, nfkc=True, term_map={"fine": "good", "<b>": "never"}))
    assert clean("<b>ﬁne</b>&lt;b&gt;") == "good" + "never"
    assert cleaner_of(CleaningConfig())("<b>ﬁ") == "<b>ﬁ"


def test_every_string_of_a_document_is_cleaned() -> None:
    clean = cleaner_of(CleaningConfig(strip_html=True))
    pair = clean_document(Document("f:1", prompt="<b>p</b>", completion="<i>c</i>"), clean)
    assert (pair.prompt, pair.completion, pair.text, pair.where) == ("p", "c", None, "f:1")
    chat = Document("f:2", messages=({"role": "<user>", "content": "<b>hi</b>", "tool_call_id": "<x>"},))
    cleaned = clean_document(chat, clean)
    assert cleaned.messages == ({"role": "<user>", "content": "hi", "tool_call_id": "<x>"},)


def test_digest_is_of_content_alone() -> None:
    digests = [
        document_digest(document)
        for document in (
            Document("a:1", text="same"),
            Document("b:9", text="same"),
            Document("a:1", text="other"),
            Document("a:1", prompt="same", completion=""),
            Document("a:1", prompt="", completion="same"),
            Document("a:1", messages=({"role": "user", "content": "same"},)),
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert {len(digest) for digest in digests} == {16}


def test_heldout_share_is_met_and_grows_monotonically() -> None:
    digests = [document_digest(Document("", text=str(n))) for n in range(4000)]
    chosen = [{d for d in digests if is_heldout(d, fraction)} for fraction in (0.0, 0.05, 0.2)]
    assert not chosen[0]
    assert chosen[1] < chosen[2]
    assert abs(len(chosen[1]) / 4000 - 0.05) < 0.015
    assert is_heldout(b"\xff" * 16, 0.999999) is False
    assert is_heldout(bytes(16), 1e-9) is True
