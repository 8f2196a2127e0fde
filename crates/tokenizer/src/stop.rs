//! Stop strings in a stream of text.

/// Finds the first stop string in text that comes in pieces, and holds back only what may yet become one.
///
/// The first match is the one that ends first; of several that end together, the longest. So the result does not
/// depend on how the text is cut. Each byte costs one step of a Knuth–Morris–Pratt automaton per stop string, so the
/// work is linear in the text.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include_stop_str_in_output: bool,
    /// Text that came in and has not been written: exactly the longest suffix that begins a stop string.
    held: String,
    matched: bool,
}

/// A stop string was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Its place in the list that the matcher was made from.
    pub index: usize,
}

/// One stop string with its automaton.
#[derive(Clone, Debug)]
struct Pattern {
    index: usize,
    bytes: Box<[u8]>,
    /// Per prefix length minus one, the length of the longest proper prefix that is also its suffix.
    failure: Box<[usize]>,
    /// Length of the longest prefix that the text so far ends with.
    state: usize,
}

impl StopMatcher {
    /// A matcher for these stop strings; empty ones never match.
    ///
    /// A match and what follows it are not written, unless `include_stop_str_in_output` asks for the match itself.
    pub fn new<S: AsRef<str>>(stop: &[S], include_stop_str_in_output: bool) -> Self {
        let patterns = stop.iter().enumerate().filter(|(_, stop)| !stop.as_ref().is_empty());
        Self {
            patterns: patterns.map(|(index, stop)| Pattern::new(index, stop.as_ref())).collect(),
            include_stop_str_in_output,
            held: String::new(),
            matched: false,
        }
    }

    /// Takes the next piece of text and appends to `out` what is certain not to be part of a stop string.
    ///
    /// After a match, further text is dropped.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<StopMatch> {
        if self.patterns.is_empty() {
            out.push_str(text);
            return None;
        }
        if self.matched {
            return None;
        }
        let start = self.held.len();
        self.held.push_str(text);
        for (at, &byte) in self.held.as_bytes().iter().enumerate().skip(start) {
            let mut longest: Option<&Pattern> = None;
            for pattern in &mut self.patterns {
                if pattern.step(byte) && longest.is_none_or(|best| pattern.bytes.len() > best.bytes.len()) {
                    longest = Some(pattern);
                }
            }
            if let Some(&Pattern { index, ref bytes, .. }) = longest {
                let end = at + 1;
                let cut = if self.include_stop_str_in_output { end } else { end - bytes.len() };
                out.push_str(&self.held[..cut]);
                self.held.clear();
                self.matched = true;
                return Some(StopMatch { index });
            }
        }
        // A suffix that begins a stop string begins with that string's first byte: a character boundary.
        let keep = self.patterns.iter().map(|pattern| pattern.state).max().unwrap_or(0);
        out.push_str(&self.held[..self.held.len() - keep]);
        self.held.drain(..self.held.len() - keep);
        None
    }

    /// Ends the text without a match: writes what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// How many bytes are held back at the moment.
    pub fn held_len(&self) -> usize {
        self.held.len()
    }
}

impl Pattern {
    fn new(index: usize, text: &str) -> Self {
        let bytes: Box<[u8]> = text.as_bytes().into();
        let mut failure = vec![0; bytes.len()];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = failure[length - 1];
            }
            if bytes[i] == bytes[length] {
                length += 1;
            }
            failure[i] = length;
        }
        Self { index, bytes, failure: failure.into(), state: 0 }
    }

    /// Takes one byte; whether the text now ends with the whole stop string.
    fn step(&mut self, byte: u8) -> bool {
        while self.state > 0 && self.bytes[self.state] != byte {
            self.state = self.failure[self.state - 1];
        }
        if self.bytes[self.state] == byte {
            self.state += 1;
        }
        if self.state < self.bytes.len() {
            return false;
        }
        self.state = self.failure[self.state - 1];
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small xorshift generator: the tests need variety, not quality.
    fn next(state: &mut u64, bound: usize) -> usize {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        (*state % bound as u64) as usize
    }

    fn run(stop: &[&str], include: bool, pieces: &[&str]) -> (String, Option<usize>) {
        let (mut matcher, mut out) = (StopMatcher::new(stop, include), String::new());
        for piece in pieces {
            if let Some(found) = matcher.push(piece, &mut out) {
                return (out, Some(found.index));
            }
        }
        matcher.finish(&mut out);
        (out, None)
    }

    /// What the matcher should do, by looking at the whole text.
    fn expected(stop: &[&str], include: bool, text: &str) -> (String, Option<usize>) {
        let first = (0..stop.len())
            .filter(|&i| !stop[i].is_empty())
            .filter_map(|i| text.find(stop[i]).map(|start| (start + stop[i].len(), start, i)))
            .min();
        match first {
            Some((end, start, i)) => (text[..if include { end } else { start }].to_owned(), Some(i)),
            None => (text.to_owned(), None),
        }
    }

    #[test]
    fn known_cases() {
        assert_eq!(run(&["END"], false, &["the E", "N", "D of"]), ("the ".into(), Some(0)));
        assert_eq!(run(&["END"], true, &["the E", "N", "D of"]), ("the END".into(), Some(0)));
        assert_eq!(run(&["END"], false, &["the E", "Nd"]), ("the ENd".into(), None));
        assert_eq!(run(&["bc", "abc"], false, &["a", "b", "c"]), (String::new(), Some(1)));
        assert_eq!(run(&["世界"], false, &["你好世", "界"]), ("你好".into(), Some(0)));
        assert_eq!(run(&["aab"], false, &["aaa", "ab"]), ("aa".into(), Some(0)));
        assert_eq!(run(&["", "x"], false, &["yx"]), ("y".into(), Some(1)));
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let (mut matcher, mut out) = (StopMatcher::new(&["</s>", "\n\n"], false), String::new());
        matcher.push("hello\n", &mut out);
        assert_eq!((out.as_str(), matcher.held_len()), ("hello", 1));
        matcher.push("w</", &mut out);
        assert_eq!((out.as_str(), matcher.held_len()), ("hello\nw", 2));
        matcher.finish(&mut out);
        assert_eq!(out, "hello\nw</");
    }

    #[test]
    fn the_cut_of_the_text_does_not_matter() {
        let alphabet = ["a", "b", "é", "世"];
        let mut state = 0x2545_f491_4f6c_dd1d;
        for round in 0..20_000 {
            let word = |max: usize, state: &mut u64| -> String {
                (0..next(state, max)).map(|_| alphabet[next(state, alphabet.len())]).collect()
            };
            let stop: Vec<String> = (0..1 + next(&mut state, 4)).map(|_| word(5, &mut state)).collect();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let text = word(30, &mut state);
            let mut pieces = vec![];
            let mut rest = text.as_str();
            while !rest.is_empty() {
                let at = rest.char_indices().nth(1 + next(&mut state, 4)).map_or(rest.len(), |(at, _)| at);
                let (piece, tail) = rest.split_at(at);
                pieces.push(piece);
                rest = tail;
            }
            for include in [false, true] {
                let (out, found) = run(&stop, include, &pieces);
                let (want, want_found) = expected(&stop, include, &text);
                assert_eq!(out, want, "round {round}: {stop:?} in {pieces:?}");
                // Two equal stop strings are the same match.
                assert_eq!(found.map(|i| stop[i]), want_found.map(|i| stop[i]), "round {round}");
            }
        }
    }
}
