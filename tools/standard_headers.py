"""Which headers of others a source file uses without including them.

The common headers are precompiled (cmake/quick_compile.cmake), so that a file compiles although it forgot
one. For each name of the table, a file or a header of this tree that it includes, directly or not, has to
include a header of the name's row.
"""
import re

# Headers of which one has to be included -> what needs them.
NEEDS = [
    ("fmt/core.h fmt/format.h", r"fmt::(format|runtime|string_view|print)\b"),
    ("algorithm", r"std::(stable_sort|sort|clamp|copy_n|copy|fill_n|fill|any_of|all_of|none_of|find_if|max_element|"
                  r"min_element|nth_element|lower_bound|upper_bound|equal|reverse|remove_if|transform)\("),
    ("algorithm ranges numeric", r"std::ranges::\w+\("),
    ("array", r"std::array\b"),
    ("atomic", r"std::atomic\w*\b"),
    ("chrono", r"std::chrono::"),
    ("cmath", r"std::(sqrt|floor|ceil|isnan|isfinite|isinf|lround|ldexp|frexp|exp2?|log2?|pow|fabs|fma|nearbyint|"
              r"nextafter|signbit|round|trunc)\("),
    ("cstring", r"std::(mem(cpy|set|cmp|move|chr)|strlen|strcmp|strerror|strncpy)\("),
    ("functional", r"std::(function|greater|hash|invoke)\b"),
    ("map", r"std::(multi)?map\b"),
    ("memory", r"std::(unique_ptr|shared_ptr|weak_ptr|make_unique|make_shared)\b"),
    ("mutex", r"std::(mutex|lock_guard|unique_lock|scoped_lock|call_once|once_flag)\b"),
    ("numeric", r"std::(accumulate|iota|reduce|gcd|lcm|inner_product|partial_sum)\("),
    ("optional", r"std::(optional|nullopt|make_optional)\b"),
    ("span", r"std::(span|as_bytes|as_writable_bytes)\b"),
    ("string", r"std::(string|to_string)\b"),
    ("string_view string", r"std::string_view\b"),
    ("thread", r"std::(jthread|thread|this_thread)\b"),
    ("unordered_map", r"std::unordered_(multi)?map\b"),
    ("vector", r"std::vector\b"),
]
NEEDS = [(frozenset(headers.split()), re.compile(names)) for headers, names in NEEDS]
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
NOT_CODE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"')


class Includes:
    """resolve(path, name): the path of this tree's header that `name` means in `path`, or None."""

    def __init__(self, texts, resolve):
        self.texts, self.resolve, self.known = texts, resolve, {}

    def of(self, path):
        """All headers of others that reach `path` through this tree's own."""
        found, todo, seen = set(), [path], {path}
        while todo:
            current = todo.pop()
            if current not in self.known:
                names = [name for _, name in INCLUDE.findall(self.texts[current])]
                self.known[current] = [(name, self.resolve(current, name)) for name in names]
            for name, own in self.known[current]:
                if own is None:
                    found.add(name)
                elif own in self.texts and own not in seen:
                    seen.add(own)
                    todo.append(own)
        return found

    def missing(self, path):
        """(line, name that is used, headers of which one would do)"""
        reached = self.of(path)
        code = NOT_CODE.sub("", self.texts[path])
        for headers, names in NEEDS:
            match = None if headers & reached else names.search(code)
            if match:
                yield code.count("\n", 0, match.start()) + 1, match.group(0).rstrip("("), sorted(headers)
