"""Names and patterns: the answers of `re` and PEFT, for every pattern, in bounded time."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from minilora.errors import ConfigError
from minilora.lora import LoraConfig
from minilora.lora.targets.patterns import (
    MAX_LENGTH,
    MAX_STATES,
    MAX_VISITS,
    MAX_VISITS_PER_LETTER,
    Pattern,
    UnsupportedPattern,
)
from minilora.lora.targets.rules import in_layers, layer_index, matches, pattern_value

NAME = "model.layers.10.self_attn.q_proj"

# ---- random patterns ----

LETTERS = "ab.0_"
NAMES = st.text(LETTERS, max_size=8)


def joined(parts, least=1, most=None, separator=""):
    """Several of `parts`, as one text."""
    return st.lists(parts, min_size=least, max_size=most).map(separator.join)


def words(text):
    """One of the words of `text`."""
    return st.sampled_from(text.split())


CHARACTERS = words(r"a b 0 _ . \. \d \w \s \D \W \S \_ - ] }")
MEMBERS = words(r"a b 0 _ . a-b 0-9 _-b \d \w \S \. \] \- ( * $")
FIRST = st.sampled_from(["", "^", "]", "^]"])
LAST = st.sampled_from(["", "-"])
SETS = st.builds("[{}{}{}]".format, FIRST, joined(MEMBERS), LAST)
COUNTS = words("* + ? {0} {1} {2} {0,2} {1,3} {2,} {0,} *? +? ?? {2}? {0,2}? {1}?")


def larger(inner):
    """Sequences, alternatives and repetitions of smaller patterns."""
    groups = st.builds("({}{})".format, st.sampled_from(["", "?:"]), inner)
    repeated = st.builds("{}{}".format, groups | CHARACTERS | SETS, COUNTS)
    return joined(inner, most=4) | joined(inner, 2, 3, "|") | repeated | groups


def with_looks(inner):
    """The same, and look-aheads."""
    return larger(inner) | st.builds("(?{}{})".format, st.sampled_from("=!"), inner)


ANCHORS = words(r"^ $ \b \B \A \Z")
PATTERNS = st.recursive(CHARACTERS | SETS | ANCHORS, larger, max_leaves=12)
LOOKING = st.recursive(CHARACTERS | SETS | ANCHORS, with_looks, max_leaves=12)
UNANCHORED = st.recursive(CHARACTERS | SETS, larger, max_leaves=12)
SHORT = PATTERNS.filter(lambda pattern: len(pattern) <= 30)

# ---- patterns ----


def same_as_re(pattern, name):
    return Pattern(pattern).fullmatch(name) == (re.fullmatch(pattern, name) is not None)


@given(PATTERNS, NAMES)
@example("(a|ab)(c|bcd)?(d*)", "abcd")
@example("[]a]+", "]a")
@example("[^]a]+", "b")
@example("[a-]+", "-a")
@example("[a^]+", "^a")
@example("a|^b$|", "b")
@example("(a*)*b", "aab")
@example("a?b", "aab")
@example("a+", "")
@example("a{2,}", "a")
@example("a{1,3}", "aaaa")
@example("a*?b+?c??", "aab")
@example("(?:.*?(?:layers|model).*?(?:attn|mlp).*?(?:q|v)_proj)", "model.layers.1.attn.q_proj")
@example(".*layers\\.1\\..*(k|down)_proj", "model.layers.1.self_attn.k_proj")
def test_pattern_fullmatch_answers_as_re_does(pattern, name):
    assume(len(pattern) <= MAX_LENGTH)
    assert same_as_re(pattern, name)


@given(LOOKING, NAMES)
@example("(?!.*b)a.*", "aab")
@example("(?=a)*a", "a")
@example("a(?!b)|ab(?=$)", "ab")
@example("(?=(?!a.*b)a.*c).*", "axc")
@example("(?!(?=ab)a).*", "ab")
@example("(?:(?!bb).)*", "abab")
@example(".*(?=b).", "ab")
@example("((?=a.)a|b){2}", "ab")
@example(r"(?P<first>a)\B(?P<second>b)", "ab")
@example("(?!)", "")
@example("(?=)a", "a")
def test_pattern_fullmatch_looks_ahead_as_re_does(pattern, name):
    assert same_as_re(pattern, name)


@given(LOOKING, NAMES, st.integers(0, 8))
def test_pattern_ends_sees_the_whole_name_ahead(pattern, name, number):
    """A match may end anywhere, but a look-ahead sees what follows, as in `re`."""
    start = number % (len(name) + 1)
    expected = set()
    for end in range(start, len(name) + 1):
        rest = re.escape(name[end:])
        if re.compile(rf"(?:{pattern})(?={rest}\Z)").match(name, start):
            full = re.compile(rf"(?s:.{{{start}}})(?:{pattern}){rest}").fullmatch(name)
            expected |= {end} if full else set()
    assert Pattern(pattern).ends(name, {start}) == expected


@given(UNANCHORED, NAMES, st.integers(0, 8))
def test_pattern_ends_are_all_positions_where_a_match_can_end(pattern, name, number):
    assume(len(pattern) <= MAX_LENGTH)
    start = number % (len(name) + 1)
    expected = set()
    for end in range(start, len(name) + 1):
        if re.fullmatch(pattern, name[start:end]):
            expected.add(end)
    assert Pattern(pattern).ends(name, {start}) == expected


# `re` warns about [[ and --, which are characters here.
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@given(st.text("ab(|)[]^-$*+?{},1\\dB.:=!P<>", max_size=12), NAMES)
def test_pattern_accepts_nothing_that_re_refuses_or_reads_differently(pattern, name):
    """Any text at all: no crash, no other error, and never more than `re` accepts."""
    try:
        Pattern(pattern)
    except ConfigError:
        return
    assert same_as_re(pattern, name)


# As a widely used program writes target_modules: two ways to name a layer, with a word's edge.
PROJECTIONS = "k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj"
BLOCKS = "self_attn|attention|attn|mlp|feed_forward|ffn|dense"
TWO_WAYS = (
    rf"(?:.*?(?:language|text).*?(?:{BLOCKS}).*?(?:{PROJECTIONS}).*?)|"
    rf"(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{BLOCKS})\.(?:(?:{PROJECTIONS})))"
)


@pytest.mark.parametrize("name", ["q_proj", "norm"])
@pytest.mark.parametrize("block", ["self_attn", "mlp", "self_attn.x", "x"])
@pytest.mark.parametrize("start", ["", "x.", "language_", "my_"])
def test_targets_of_two_long_ways_mean_what_re_finds(start, block, name):
    path = f"{start}model.layers.11.{block}.{name}"
    assert len(TWO_WAYS) > 250
    assert matches(path, TWO_WAYS) == (re.fullmatch(TWO_WAYS, path) is not None)
    LoraConfig(target_modules=TWO_WAYS)


class Counted(list):
    """A list that counts how often an element is read."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


HANGS = (
    r"(([a-z_0-9]+)*\.?)*! (.*)*x (.|.)*! ((((.*)*)*)*)*! (.*.*.*.*.*.*)*! ((.?){30}){6}! "
    r"(?!((.*)*)*$).*! (?=(.*)*x).* (?:(?=(.|.)*$).)*! (?!(?!((.?){30})*!).).*x.*!"
)


@pytest.mark.parametrize("pattern", HANGS.split())
def test_pattern_that_hangs_in_re_takes_bounded_work(pattern, monkeypatch):
    """Counted, not timed: a state is entered at most once per position, and read three times."""
    compiled = Pattern(pattern)
    states = Counted(compiled._states)
    monkeypatch.setattr(compiled, "_states", states)
    assert not compiled.fullmatch(NAME * 3)
    # Each look-ahead reads its own states once more from the end, and so do those around it.
    passes = 3 + 3 * pattern.count("(?=") + 3 * pattern.count("(?!")
    assert 0 < states.reads <= passes * len(states) * (len(NAME) * 3 + 1)
    assert len(states) <= MAX_STATES
    assert not matches(NAME, pattern)
    assert not pattern_value(NAME, {pattern: 1}, 0)
    assert layer_index(NAME, pattern) is None


UNSUPPORTED: list[tuple[str, str]] = []


def unsupported(problem, *patterns):
    UNSUPPORTED.extend((pattern, problem) for pattern in patterns)


unsupported("30001 characters", "a" * 30_001)
unsupported("more than 40 groups", "(" * 41 + ")" * 41, "(?=" * 41 + ")" * 41)
unsupported("possessive", "a*+", "a++")
unsupported("doubled", "a**", "a+{2}", "a+??", "a{1}*")
unsupported("of nothing", "^*", "${2}", r"a\b+", r"\B*", r"\Z?")
unsupported("nothing to repeat", "*", "a|+")
unsupported("another kind", "(?<=a)b", "(?<!a)b", "(?P<1>a)", "(?P<n", "(?i)a", "(?>a)", "(?")
unsupported("another kind", "(?P<n>a)(?P=n)")
unsupported("a second group of the name n", "(?P<n>a)(?P<n>b)")
unsupported(r"escape \\1", r"(a)\1")
unsupported("escape", r"[\b]", r"[\B]", r"\z")
unsupported("a backslash at the end", "a\\")
unsupported(r"without its \)", "(a")
unsupported(r"without its \(", "a)")
unsupported("without its ]", "[a", "[]", "[^]")
unsupported("range", "[b-a]", r"[\d-z]", r"[a-\d]")
unsupported("begins no", "a{", "a{x}", "a{,3}", "a{1,2,3}", "a{}", "a{\u0663}")
unsupported("must rise", "a{3,2}")
unsupported("within 100", "a{101}", "a{1,101}", "a{" + "9" * 150 + "}")
unsupported("too many", "(((){99}){99}){99}", "(((a{0}){99}){99}){4}", "(((a?){99}){99}){3}")
unsupported("too many", "((?=a{99}){99}){99}")
unsupported(r"'\\x1b", "\x1b[31m(")


NOT_RUN = ["possessive", "another kind", "escape", r"escape \\1", "begins no"]


@pytest.mark.parametrize(("pattern", "problem"), UNSUPPORTED)
def test_pattern_outside_the_subset_raises_with_the_pattern_and_the_subset(pattern, problem):
    with pytest.raises(ConfigError, match=problem) as caught:
        Pattern(pattern)
    # What `re` may know is told from what is invalid or too large for anybody.
    assert isinstance(caught.value, UnsupportedPattern) == (problem in NOT_RUN)
    text = str(caught.value)
    assert len(text) <= 500
    assert text.isprintable()
    assert repr(pattern)[:50] in text
    assert "supported are literals" in text


def test_pattern_of_every_layer_by_its_full_name_is_run(monkeypatch):
    names = []
    for layer in range(80):
        names += [f"model.layers.{layer}.self_attn.{name}_proj" for name in "qkvo"]
    pattern = f"^({'|'.join(names).replace('.', chr(92) + '.')})$"
    assert len(pattern) > 10_000
    compiled = Pattern(pattern)
    assert all(compiled.fullmatch(name) for name in names[::40])
    assert not compiled.fullmatch("model.layers.80.self_attn.q_proj")
    LoraConfig(target_modules=pattern)


@pytest.mark.parametrize("pattern", [".*" * 3000 + "!", f"(?!{'.*' * 3000}!).*x"])
def test_pattern_with_too_many_states_at_each_letter_stops(pattern):
    """The visits are counted, over all names; an ordinary pattern never comes near the limit."""
    compiled = Pattern(pattern)
    names = iter(f"{NAME}.{number}" for number in range(1000))
    with pytest.raises(ConfigError, match="takes too long: it follows more than 500 of its"):
        list(map(compiled.fullmatch, names))
    assert next(names, None) is not None
    assert compiled._visits <= MAX_VISITS + MAX_VISITS_PER_LETTER * compiled._letters + 10_000


# ---- names ----

MEANT: list[tuple[str, str | list[str], bool]] = []


def meant(name, targets, expected=True):
    MEANT.append((name, targets, expected))


meant("q_proj", ["q_proj"])
meant("a.q_proj", ["q_proj"])
meant("a.q_proj", ["proj"], False)
meant("mlp.c_proj", ["c_proj"])
meant("a.b", ["a"], False)
meant("a.b", [], False)
meant("a.b.c", ["b.c"])
meant("axb", ["a.b"], False)
meant("x.(", ["("])  # a list holds names, never patterns
meant("a.q_proj", "q_proj", False)
meant("a.q_proj", r".*\.q_proj")
meant("a.q_proj", "q_proj|a.*")
meant("q_proj", "q_proj")


@pytest.mark.parametrize(("name", "targets", "expected"), MEANT)
def test_matches_names_endings_and_patterns(name, targets, expected):
    assert matches(name, targets) is expected


VALUES: list[tuple[dict[str, int], int]] = []


def value_of(expected, **patterns):
    VALUES.append((patterns, expected))


value_of(0)
value_of(1, q_proj=1)
value_of(0, proj=1)
value_of(0, self_attn=1)
value_of(1, **{"self_attn.q_proj": 1})
value_of(0, **{r"layers\.1\.self_attn\.q_proj": 1})
value_of(1, **{r"layers\.10\..*": 1})
value_of(0, **{"^q_proj": 1})
value_of(1, **{"^model.*": 1})
value_of(1, **{"q_proj$": 1})
value_of(2, **{"k_proj": 1, ".*": 2, "q_proj": 3})
value_of(3, **{"q_proj": 3, ".*": 2})
value_of(1, **{"k_proj|q_proj": 1})


@pytest.mark.parametrize(("patterns", "expected"), VALUES)
def test_pattern_value_takes_the_first_key_that_matches(patterns, expected):
    assert pattern_value(NAME, patterns, 0) == expected


@given(st.lists(SHORT, max_size=3), NAMES)
def test_pattern_value_follows_pefts_rule(patterns, name):
    keys = {key: place for place, key in enumerate(patterns)}
    matching = [value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", name)]
    expected = matching[0] if matching else -1
    assert pattern_value(name, keys, -1) == expected


# ---- layers ----

PARTS = st.sampled_from(["", "a", "h", "layers", "0", "1", "12", "1a", "\u0663", "\u00b2"])
PATHS = joined(PARTS, 0, 7, ".")
LAYERS = st.sampled_from(["h", "layers", r"a\.h", "(a|h)", "[ah]", r"layers\.\d+\.a", ".*", ""])


def index_of(match):
    return int(match["idx"]) if match else None


@given(PATHS)
@example("layers.0.q_proj")
@example("model.layers.0")
@example("model.layers.1.experts.0.w")
def test_layer_index_without_a_pattern_follows_pefts_rule(name):
    expected = index_of(re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name))
    assert layer_index(name) == expected
    assert layer_index(name, []) == expected
    assert layer_index(name, "") == expected


@given(PATHS, st.lists(LAYERS, min_size=1))
def test_layer_index_with_patterns_follows_pefts_rule(name, patterns):
    assume(any(patterns))
    match = None
    for pattern in patterns:
        match = match or re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)
    assert layer_index(name, patterns) == index_of(match)
    if patterns[0]:
        assert layer_index(name, patterns[0]) == layer_index(name, patterns[:1])


def test_in_layers_takes_numbers_lists_and_patterns():
    for everything in None, []:
        assert in_layers(NAME, everything) is True
    assert in_layers(NAME, None, "h") is True
    for layers in 10, [1, 10]:
        assert in_layers(NAME, layers) is True
    for layers in 1, 0, [1]:
        assert in_layers(NAME, layers) is False
    for pattern in "layers", ["h", "layers"]:
        assert in_layers(NAME, [10], pattern) is True
    assert in_layers(NAME, [10], "h") is False


def test_in_layers_counts_layer_zero_and_never_a_name_without_a_number():
    assert in_layers("model.layers.0.q", 0)
    assert not in_layers("model.layers.1.q", 0)
    assert not in_layers("layers.0.q", 0)  # PEFT's trap
    assert in_layers("layers.0.q", 0, "layers")


def test_layer_index_refuses_a_lazy_pattern_which_could_prefer_another_number():
    with pytest.raises(ConfigError, match=r"layers_pattern 'a\.\*\?' has a lazy repetition"):
        layer_index("a.0.a.1.x", ["h", "a.*?"])
    with pytest.raises(ConfigError, match="lazy"):
        LoraConfig(target_modules=["q"], layers_to_transform=1, layers_pattern="a.*?")


# ---- PEFT itself ----

MODULES = joined(words("model layers h 0 1 attn q_proj proj"), separator=".")
LISTS = st.sampled_from([["q_proj"], ["proj", "attn"], ["attn.q_proj"]])
TARGETS = LISTS | words(r".*q_proj model\..*(attn|proj)")
NUMBERS = st.sampled_from([None, [], 0, 1, [0], [1, 0]])
CONTAINERS = st.sampled_from([None, [], "", "layers", ["h", "layers"]])


@pytest.mark.oracle
@given(MODULES, TARGETS, NUMBERS, CONTAINERS)
def test_matches_and_in_layers_choose_the_modules_that_peft_chooses(name, targets, layers, pattern):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    fields = {"layers_to_transform": layers, "layers_pattern": pattern}
    config = SimpleNamespace(target_modules=targets, **fields)
    chosen = matches(name, targets)
    # PEFT restricts neither patterns nor full names to layers.
    if not isinstance(targets, str) and name not in targets:
        chosen = chosen and in_layers(name, layers, pattern)
    assert chosen == bool(tuners.check_target_module_exists(config, name))


@pytest.mark.oracle
@given(NAMES, st.lists(SHORT, max_size=3, unique=True))
def test_pattern_value_takes_the_key_that_peft_takes(name, patterns):
    other = pytest.importorskip("peft.utils.other")
    assume(name not in patterns)
    table = {pattern: pattern for pattern in patterns}
    assert pattern_value(name, table, name) == other.get_pattern_key(patterns, name)
