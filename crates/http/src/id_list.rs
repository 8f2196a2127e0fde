//! Lists of token ids, read without a JSON parser: prompts of tens of thousands of them come so.

/// Every byte of a word.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The top bit of each.
const TOPS: u64 = 0x80 * ONES;
/// Bytes in which commas are looked for together.
const CHUNK: usize = 64;

/// The list of whole numbers at the start of `json` (at its `[`), and its length in bytes. `None`: it is something else,
/// or not JSON, or empty, or holds a number that is no `u32`.
pub(crate) fn parse(json: &[u8]) -> Option<(Vec<u32>, usize)> {
    // Most ids have three digits or more.
    let mut ids = Vec::with_capacity(json.len() / 4);
    let mut at = 1 + blanks(json.get(1..)?);
    loop {
        at = plain(json, at, &mut ids);
        // Whatever looks otherwise, for a while.
        for _ in 0..CHUNK {
            at += blanks(&json[at..]);
            let (id, length) = number(&json[at..])?;
            ids.push(id);
            at += length;
            at += blanks(&json[at..]);
            match json.get(at)? {
                b',' => at += 1,
                b']' => return Some((ids, at + 1)),
                _ => return None,
            }
        }
    }
}

/// White space at the start (RFC 8259, section 2).
pub(crate) fn blanks(json: &[u8]) -> usize {
    json.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count()
}

/// The number at the start, and how many digits it has. Whatever follows it is not looked at.
fn number(json: &[u8]) -> Option<(u32, usize)> {
    let length = json.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = std::str::from_utf8(&json[..length]).ok()?.parse().ok()?;
    // JSON has no leading zeros.
    if json[0] == b'0' && length > 1 { None } else { Some((value, length)) }
}

/// Reads numbers from `start` on as long as they are written as programs write them, and returns where it stopped: at the
/// start of a number, white space before it perhaps.
fn plain(json: &[u8], start: usize, ids: &mut Vec<u32>) -> usize {
    let length = json[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    match json.get(start + length..start + length + 2) {
        Some(b", ") => spaced::<1>(json, start, ids),
        _ => spaced::<0>(json, start, ids),
    }
}

/// [`plain`] where commas are followed by `SPACES` spaces. All commas of a chunk are found first, so that no number waits
/// for the length of the one before, and all that could be wrong with a chunk's numbers is asked once.
fn spaced<const SPACES: usize>(json: &[u8], start: usize, ids: &mut Vec<u32>) -> usize {
    let mut next = start;
    let mut numbers = [0; CHUNK];
    for (at, chunk) in json[start..].as_chunks().0.iter().enumerate() {
        let (first, base) = (next, start + at * CHUNK);
        let mut commas = commas(chunk);
        let (mut count, mut lengths, mut bytes, mut is_odd) = (0, 0, 0, false);
        while commas != 0 {
            let end = base + commas.trailing_zeros() as usize;
            commas &= commas - 1;
            let length = end.wrapping_sub(next);
            let Some(word) = json.get(next..).and_then(<[u8]>::first_chunk) else { return first };
            // The first character is in the lowest byte. What is behind the number makes way for zeros before it.
            let digits = u64::from_le_bytes(*word) ^ (ONES * u64::from(b'0'));
            let number = digits << (8 * (8_usize.wrapping_sub(length) % 8));
            is_odd |= (digits & 0xFF == 0) & (length != 1);
            if SPACES == 1 {
                is_odd |= json.get(end + 1) != Some(&b' ');
            }
            lengths |= length.wrapping_sub(1);
            // Sets the top bit of each byte that is no digit: 10 or more, counting seven bits, or with an eighth.
            bytes |= number | number.wrapping_add(ONES * 0x76);
            numbers[count % CHUNK] = number;
            count += 1;
            next = end + 1 + SPACES;
        }
        // One to eight digits, and nothing else, and no zero before others.
        if is_odd || lengths > 7 || bytes & TOPS != 0 {
            return first;
        }
        ids.extend(numbers[..count].iter().map(|&number| value(number)));
    }
    next
}

/// Where commas are: a bit for each byte, the first one lowest.
fn commas(chunk: &[u8; CHUNK]) -> u64 {
    let mut mask = 0;
    for (at, &word) in chunk.as_chunks().0.iter().enumerate() {
        let rest = u64::from_le_bytes(word) ^ (ONES * u64::from(b','));
        // The top bit of each byte that is zero.
        let zeros = !(((rest & !TOPS) + !TOPS) | rest) & TOPS;
        // Gathered in the highest byte.
        mask |= ((zeros >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * at);
    }
    mask
}

/// Of eight digits, the first one in the lowest byte.
fn value(digits: u64) -> u32 {
    // Pairs, fours and all eight are put together; no sum runs over into the next.
    let pairs = (digits.wrapping_mul(10).wrapping_add(digits >> 8)) & 0x00FF_00FF_00FF_00FF;
    let fours = (pairs.wrapping_mul(100).wrapping_add(pairs >> 16)) & 0x0000_FFFF_0000_FFFF;
    fours.wrapping_mul(10_000).wrapping_add(fours >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a real parser makes of it, where it is what we read.
    fn expected(json: &str) -> Option<(Vec<u32>, usize)> {
        let mut values = serde_json::Deserializer::from_str(json).into_iter::<Vec<u32>>();
        let ids = values.next()?.ok().filter(|ids| !ids.is_empty())?;
        Some((ids, values.byte_offset()))
    }

    #[test]
    fn lists_are_those_of_a_json_parser() {
        for list in [
            "[1]",
            "[0, 10,200 , 3000\n,\t40000,\r\n500000 ,6000000,70000000,800000000,4294967295 ]",
            "[ 9999999 ,99999999,0]  ",
            "[1, 2], \"more\": [3]}",
            "[]",
            "[ ]",
            "[",
            "[1",
            "[1,",
            "[1,]",
            "[,1]",
            "[1 2]",
            "[01]",
            "[00]",
            "[1, -2]",
            "[1.5]",
            "[1e3]",
            "[1, null]",
            "[1, \"2\"]",
            "[1, [2]]",
            "[4294967296]",
            "[99999999999999999999]",
            "[1}",
            "[/]",
            "[:]",
            "[1\u{e9}]",
            "[\u{b1}1]",
            "[1\0]",
        ] {
            assert_eq!(parse(list.as_bytes()), expected(list), "{list}");
        }
    }

    #[test]
    fn numbers_of_every_length_and_at_every_distance_from_the_end() {
        for length in 1..=11 {
            for value in [10u64.pow(length - 1), 10u64.pow(length) - 1, 1_234_567_890_123 % 10u64.pow(length)]
            {
                for tail in ["]", "]]", ", 7]", ",12345678]", "]          "] {
                    let list = format!("[{value}{tail}");
                    assert_eq!(parse(list.as_bytes()), expected(&list), "{list}");
                }
            }
        }
    }

    /// Long enough for all ways, with every byte at every place of a number, and every separator.
    #[test]
    fn whatever_lies_among_plain_numbers() {
        let plain = |count: usize, comma: &str| {
            let ids = (0..count).map(|at| (at * at * 7919 % 10usize.pow(at as u32 % 9)).to_string());
            ids.collect::<Vec<_>>().join(comma)
        };
        for comma in [",", ", ", " ,", ",\n", ",  "] {
            for count in [1, 2, 15, 16, 17, 100, 400] {
                let list = format!("[{}]", plain(count, comma));
                assert!(parse(list.as_bytes()).is_some_and(|(ids, _)| ids.len() == count), "{list}");
                assert_eq!(parse(list.as_bytes()), expected(&list), "{list}");
            }
            let rest = plain(200, comma);
            let others = [
                "",
                "0",
                "00",
                "012345",
                "12345678",
                "123456789",
                "4294967295",
                "4294967296",
                "-1",
                "1.5",
                "[1]",
            ];
            for other in others.into_iter().map(str::to_owned).chain((0..=127).flat_map(|byte: u8| {
                (0..=4).map(move |at| format!("{}{}{}", &"1234"[..at], char::from(byte), &"1234"[at..]))
            })) {
                let list = format!("[{rest}{comma}{other}{comma}{rest}]");
                assert_eq!(parse(list.as_bytes()), expected(&list), "{list}");
            }
        }
        assert_eq!(parse("[1,2\u{e9},3]".repeat(40).as_bytes()), None);
    }
}
