//! Lists of token ids, read without a JSON parser: prompts of tens of thousands of them come so.

/// The list of whole numbers at the start of `json` (at its `[`), and its length in bytes. `None`: it is something else,
/// or not JSON, or empty, or holds a number that is no `u32`.
pub(crate) fn parse(json: &[u8]) -> Option<(Vec<u32>, usize)> {
    // Most ids have three digits or more.
    let mut ids = Vec::with_capacity(json.len() / 4);
    let mut at = 1 + blanks(json.get(1..)?);
    loop {
        let (id, length) = number(&json[at..])?;
        ids.push(id);
        at += length;
        at += blanks(&json[at..]);
        match json.get(at)? {
            b',' => at += 1,
            b']' => return Some((ids, at + 1)),
            _ => return None,
        }
        at += blanks(&json[at..]);
    }
}

/// White space at the start (RFC 8259, section 2).
pub(crate) fn blanks(json: &[u8]) -> usize {
    json.iter().take_while(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t')).count()
}

/// The number at the start, and how many digits it has. Whatever follows it is not looked at.
fn number(json: &[u8]) -> Option<(u32, usize)> {
    let (value, length) = match json.first_chunk() {
        Some(&bytes) => up_to_seven_digits(bytes).or_else(|| digits(json))?,
        None => digits(json)?,
    };
    // JSON has no leading zeros.
    if json[0] == b'0' && length > 1 { None } else { Some((value, length)) }
}

/// All digits in one go, as each would otherwise be a jump that is hard to foresee.
fn up_to_seven_digits(bytes: [u8; 8]) -> Option<(u32, usize)> {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // The first character is in the lowest byte.
    let values = u64::from_le_bytes(bytes) ^ (ONES * u64::from(b'0'));
    // The top bit of each byte that is no digit: 10 or more, counting seven bits, or with an eighth.
    let others = (((values & (ONES * 0x7F)) + ONES * 0x76) | values) & (ONES * 0x80);
    let length = others.trailing_zeros() / 8;
    if !(1..8).contains(&length) {
        return None;
    }
    // Zeros before the number instead of what is behind it; then pairs, fours and all eight are put together.
    let digits = values << (64 - 8 * length);
    let pairs = (digits * 10 + (digits >> 8)) & 0x00FF_00FF_00FF_00FF;
    let fours = (pairs * 100 + (pairs >> 16)) & 0x0000_FFFF_0000_FFFF;
    let value = (fours * 10_000 + (fours >> 32)) as u32;
    Some((value, length as usize))
}

fn digits(json: &[u8]) -> Option<(u32, usize)> {
    let length = json.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let value = std::str::from_utf8(&json[..length]).ok()?.parse().ok()?;
    Some((value, length))
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

    #[test]
    fn bytes_that_are_no_digits() {
        for byte in 0..=255u8 {
            for at in 0..8 {
                let mut bytes = *b"12345678";
                bytes[at] = byte;
                let expected = bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
                let found = up_to_seven_digits(bytes).map(|(_, length)| length);
                assert_eq!(found, (1..8).contains(&expected).then_some(expected), "{byte} at {at}");
            }
        }
    }
}
