"""Names and patterns: what `re` and PEFT would answer, for every pattern, in bounded time."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.lora.patterns import MAX_LENGTH, MAX_STATES, Pattern
from minilora.lora.targets import in_layers, layer_index, matches, pattern_value

LETTERS = "ab.0_"
NAMES = st.text(LETTERS, max_size=8)

CHARACTERS = st.sampled_from(
    [*"ab0_", ".", r"\.", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"\_", "-", "]", "}"]
)
MEMBERS = st.sampled_from(
    [*"ab0_.", "a-b", "0-9", "_-b", r"\d", r"\w", r"\S", r"\.", r"\]", r"\-", "(", "*", "$"]
)
SETS = st.builds(
    "[{}{}{}]".format, st.sampled_from(["", "^", "]", "^]"]), st.lists(MEMBERS, min_size=1).map("".join),
    st.sampled_from(["", "-"]),
)  # fmt: skip
COUNTS = st.sampled_from(["*", "+", "?", "{0}", "{1}", "{2}", "{0,2}", "{1,3}", "{2,}", "{0,}"])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Sequences, alternatives and repetitions of smaller patterns."""
    groups = st.builds("({}{})".format, st.sampled_from(["", "?:"]), inner)
    return st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join),
        st.builds("{}{}".format, groups | CHARACTERS | SETS, COUNTS),
        groups,
    )


PATTERNS = st.recursive(CHARACTERS | SETS | st.sampled_from(["^", "$"]), larger, max_leaves=12)


@given(PATTERNS, NAMES)
@example("(a|ab)(c|bcd)?(d*)", "abcd")
@example("[]a]+", "]a")
@example("[^]a]+", "b")
@example("[a-]+", "-a")
@example("[a^]+", "^a")
@example("a|^b$|", "b")
@example("(a*)*b", "aab")
@example(".*layers\\.1\\..*(k|down)_proj", "model.layers.1.self_attn.k_proj")
def test_a_pattern_answers_what_re_answers(pattern, name):
    assume(len(pattern) <= MAX_LENGTH)
    assert Pattern(pattern).fullmatch(name) == (re.fullmatch(pattern, name) is not None)


@given(PATTERNS, NAMES, st.integers(0, 8))
def test_ends_are_all_the_places_where_a_match_can_end(pattern, name, start):
    assume(
        len(pattern) <= MAX_LENGTH
        and start <= len(name)
        and "^" not in pattern
        and "$" not in pattern
    )
    expected = {
        end for end in range(start, len(name) + 1) if re.fullmatch(pattern, name[start:end])
    }
    assert Pattern(pattern).ends(name, {start}) == expected


@pytest.mark.filterwarnings(
    "ignore:Possible:FutureWarning"
)  # of `re`, about [[ and --; here they are characters
@given(st.text("ab(|)[]^-$*+?{},1\\d.:=!", max_size=12), NAMES)
def test_what_is_accepted_means_the_same_and_what_re_refuses_is_refused(pattern, name):
    """Any text at all: no crash, no other error, and never more than `re` would take."""
    try:
        ours = Pattern(pattern)
    except ConfigError:
        return
    assert ours.fullmatch(name) == (re.fullmatch(pattern, name) is not None)


NAME = "model.layers.10.self_attn.q_proj"
HANGS = [
    r"(([a-z_0-9]+)*\.?)*!",
    "(.*)*x",
    "(.|.)*!",
    "((((.*)*)*)*)*!",
    "(.*.*.*.*.*.*)*!",
    "((.?){30}){6}!",
]


@pytest.mark.parametrize("pattern", HANGS)
def test_patterns_that_hang_elsewhere_take_bounded_work(pattern, monkeypatch):
    """Counted, not timed: every state is entered at most once for each position."""
    compiled = Pattern(pattern)
    entered = 0

    class Counted(list):
        def __getitem__(self, index):
            nonlocal entered
            entered += 1
            return super().__getitem__(index)

    monkeypatch.setattr(compiled, "_states", Counted(compiled._states))
    assert not compiled.fullmatch(NAME * 3)
    assert entered <= 3 * len(compiled._states) * (len(NAME) * 3 + 1)
    assert len(compiled._states) <= MAX_STATES
    for use in (lambda: matches(NAME, pattern), lambda: pattern_value(NAME, {pattern: 1}, 0)):
        assert not use()
    assert layer_index(NAME, pattern) is None


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a" * 201, "201 characters"), ("(" * 41 + ")" * 41, "41 groups"), ("a*?", "lazy"), ("a*+", "possessive"),
        ("a**", "doubled"), ("a+{2}", "doubled"), ("^*", "of nothing"), ("${2}", "of nothing"),
        ("*", "nothing to repeat"), ("a|+", "nothing to repeat"), ("(?=a)", "another kind"), ("(?!a)", "another kind"),
        ("(?<=a)b", "another kind"),
        ("(?P<n>a)", "another kind"), ("(?i)a", "another kind"), (r"(a)\1", r"escape \\1"), (r"\b", "escape"),
        (r"\Z", "escape"), ("a\\", "escape"), ("(a", "without its )"), ("a)", "without its ("), ("[a", "without its ]"),
        ("[]", "without its ]"), ("[^]", "without its ]"), ("[b-a]", "range"), (r"[\d-z]", "range"),
        (r"[a-\d]", "range"),
        ("a{", "begins no"), ("a{x}", "begins no"), ("a{,3}", "begins no"), ("a{1,2,3}", "begins no"),
        ("a{\u0663}", "begins no"), ("a{3,2}", "must rise"), ("a{101}", "within 100"), ("a{1,101}", "within 100"),
        ("a{" + "9" * 150 + "}", "within 100"), ("(((){99}){99}){99}", "too many"), ("((a{0}){99}){99}", "too many"),
        ("((a?){99}){99}", "too many"), ("\x1b[31m(", r"'\\x1b"),
    ],
)  # fmt: skip
def test_outside_the_subset_the_error_shows_the_pattern_and_the_subset(pattern, problem):
    with pytest.raises(
        ConfigError, match=problem.replace("(", r"\(").replace(")", r"\)")
    ) as caught:
        Pattern(pattern)
    text = str(caught.value)
    assert len(text) <= 500
    assert text.isprintable()
    assert repr(pattern)[:50] in text
    assert "supported are literals" in text


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("q_proj", ["q_proj"], True),
        ("a.q_proj", ["q_proj"], True),
        ("a.q_proj", ["proj"], False),
        ("mlp.c_proj", ["c_proj"], True),
        ("a.b", ["a"], False),
        ("a.b", [], False),
        ("a.b.c", ["b.c"], True),
        ("axb", ["a.b"], False),
        ("x.(", ["("], True),  # a list holds names, never patterns
        ("a.q_proj", "q_proj", False),
        ("a.q_proj", r".*\.q_proj", True),
        ("a.q_proj", "q_proj|a.*", True),
        ("q_proj", "q_proj", True),
    ],
)
def test_matches(name, targets, expected):
    assert matches(name, targets) is expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({}, 0),
        ({"q_proj": 1}, 1),
        ({"proj": 1}, 0),
        ({"self_attn": 1}, 0),
        ({"self_attn.q_proj": 1}, 1),
        ({r"layers\.1\.self_attn\.q_proj": 1}, 0),
        ({r"layers\.10\..*": 1}, 1),
        ({"^q_proj": 1}, 0),
        ({"^model.*": 1}, 1),
        ({"q_proj$": 1}, 1),
        ({"k_proj": 1, ".*": 2, "q_proj": 3}, 2),
        ({"q_proj": 3, ".*": 2}, 3),
        ({"k_proj|q_proj": 1}, 1),
    ],
)
def test_pattern_value_takes_the_first_entry_that_matches(patterns, expected):
    assert pattern_value(NAME, patterns, 0) == expected


@given(st.lists(PATTERNS.filter(lambda p: len(p) <= 30), max_size=3), NAMES)
def test_pattern_value_is_pefts_rule(patterns, name):
    keys = {key: place for place, key in enumerate(patterns)}
    expected = next(
        (value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", name)), -1
    )
    assert pattern_value(name, keys, -1) == expected


PATHS = st.lists(
    st.sampled_from(["", "a", "h", "layers", "0", "1", "12", "1a", "\u0663", "\u00b2"]), max_size=7
).map(".".join)


@given(PATHS)
@example("layers.0.q_proj")
@example("model.layers.0")
@example("model.layers.1.experts.0.w")
def test_layer_index_without_a_pattern_is_pefts_rule(name):
    found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    assert layer_index(name) == (int(found["idx"]) if found else None)
    assert layer_index(name, []) == layer_index(name, "") == layer_index(name)


LAYERS = st.sampled_from(["h", "layers", r"a\.h", "(a|h)", "[ah]", r"layers\.\d+\.a", ".*", ""])


@given(PATHS, st.lists(LAYERS, min_size=1))
def test_layer_index_with_patterns_is_pefts_rule(name, patterns):
    assume(any(patterns))
    found = None
    for pattern in patterns:
        found = found or re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
    assert layer_index(name, patterns) == (int(found["idx"]) if found else None)
    if patterns[0]:
        assert layer_index(name, patterns[0]) == layer_index(name, patterns[:1])


@pytest.mark.parametrize(
    ("layers", "pattern", "expected"),
    [(None, None, True), ([], None, True), (10, None, True), (1, None, False), ([1, 10], None, True),
     ([1], None, False), (0, None, False), ([10], "layers", True),
     ([10], "h", False), ([10], ["h", "layers"], True), (None, "h", True)],
)  # fmt: skip
def test_in_layers(layers, pattern, expected):
    assert in_layers(NAME, layers, pattern) is expected


def test_layer_zero_is_a_layer_and_no_index_is_in_none():
    assert in_layers("model.layers.0.q", 0)
    assert not in_layers("model.layers.1.q", 0)
    assert not in_layers("layers.0.q", 0)  # PEFT's trap
    assert in_layers("layers.0.q", 0, "layers")


@pytest.mark.oracle
@given(
    st.lists(
        st.sampled_from(["model", "layers", "h", "0", "1", "attn", "q_proj", "proj"]), min_size=1
    ).map(".".join),
    st.sampled_from(
        [["q_proj"], ["proj", "attn"], ["attn.q_proj"], r".*q_proj", r"model\..*(attn|proj)"]
    ),
    st.sampled_from([None, [], 0, 1, [0], [1, 0]]),
    st.sampled_from([None, [], "", "layers", ["h", "layers"]]),
)
def test_peft_chooses_the_same_modules(name, targets, layers, pattern):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    config = SimpleNamespace(
        target_modules=targets, layers_to_transform=layers, layers_pattern=pattern
    )
    ours = matches(name, targets)
    if (
        not isinstance(targets, str) and name not in targets
    ):  # PEFT restricts neither patterns nor full names to layers
        ours = ours and in_layers(name, layers, pattern)
    assert ours == bool(tuners.check_target_module_exists(config, name))


@pytest.mark.oracle
@given(NAMES, st.lists(PATTERNS.filter(lambda p: len(p) <= 30), max_size=3, unique=True))
def test_peft_takes_the_same_entry_of_a_rank_pattern(name, patterns):
    other = pytest.importorskip("peft.utils.other")
    assume(name not in patterns)
    table = {pattern: pattern for pattern in patterns}
    assert pattern_value(name, table, name) == other.get_pattern_key(patterns, name)
