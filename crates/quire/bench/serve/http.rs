//! HTTP/1.1 as a client needs it that only streams answers: request heads, answer heads, and the framing of bodies.
//! Nothing is copied on the way from the socket's buffer to the events.

/// Heads are far smaller.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Digits of a chunk's size, and bytes of a line beside it.
const MAX_CHUNK_LINE: usize = 4 << 10;

/// Writes the head of a request whose body follows.
pub(crate) fn write_head(
    method: &str,
    path: &str,
    host: &str,
    api_key: Option<&str>,
    body_len: usize,
) -> Vec<u8> {
    let mut head = format!(
        "{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {body_len}\r\n"
    );
    if let Some(key) = api_key {
        head.push_str("authorization: Bearer ");
        head.push_str(key);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// The head of an answer.
#[derive(Debug, PartialEq)]
pub(crate) struct Head {
    pub(crate) status: u16,
    pub(crate) has_retry_after: bool,
    /// The connection can take another request after the body.
    pub(crate) keep_alive: bool,
    pub(crate) body: Body,
}

impl Head {
    /// The head at the start of `bytes` and its length, or `None` if its end has not come yet.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, String> {
        let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") else {
            if bytes.len() > MAX_HEAD_BYTES {
                return Err(format!("the head of the answer is longer than {MAX_HEAD_BYTES} bytes"));
            }
            return Ok(None);
        };
        let text = std::str::from_utf8(&bytes[..end]).map_err(|_| "the head of the answer is not text")?;
        let mut lines = text.split("\r\n");
        let status_line = lines.next().unwrap_or_default();
        let status = status_line
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3)?.parse().ok())
            .ok_or_else(|| format!("not an answer of HTTP/1.1: {status_line:?}"))?;
        let mut head = Self { status, has_retry_after: false, keep_alive: true, body: Body::UntilClose };
        for line in lines {
            let (name, value) =
                line.split_once(':').ok_or_else(|| format!("not a header of an answer: {line:?}"))?;
            head.take_header(name, value.trim())?;
        }
        head.keep_alive &= head.body != Body::UntilClose;
        Ok(Some((head, end + 4)))
    }

    fn take_header(&mut self, name: &str, value: &str) -> Result<(), String> {
        if name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(format!("transfer-encoding {value:?} is not supported"));
            }
            self.body = Body::Chunked(Chunked::Size { value: 0, seen: 0, done: false });
        } else if name.eq_ignore_ascii_case("content-length") && !matches!(self.body, Body::Chunked(_)) {
            let length = value.parse().map_err(|_| format!("content-length {value:?} is not a number"))?;
            self.body = Body::Sized(length);
        } else if name.eq_ignore_ascii_case("connection") {
            self.keep_alive = !value.eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("retry-after") {
            self.has_retry_after = true;
        }
        Ok(())
    }
}

/// How far a body has been read.
#[derive(Debug, PartialEq)]
pub(crate) enum Body {
    /// This many bytes are left.
    Sized(u64),
    Chunked(Chunked),
    UntilClose,
}

/// Where in a chunked body (RFC 9112, section 7.1) the next byte belongs.
#[derive(Debug, PartialEq)]
pub(crate) enum Chunked {
    /// The line with a chunk's size: its value so far, its bytes so far, whether the digits are over.
    Size {
        value: u64,
        seen: usize,
        done: bool,
    },
    /// This many bytes of the chunk are left.
    Data(u64),
    /// The line end behind a chunk.
    AfterData,
    /// Lines behind the last chunk: bytes of the current one, and of all.
    Trailer {
        line: usize,
        seen: usize,
    },
    End,
}

/// What a body gives next.
#[derive(Debug, PartialEq)]
pub(crate) enum Piece<'a> {
    Data(&'a [u8]),
    /// The input is used up.
    NeedMore,
    End,
}

impl Body {
    /// The next piece of the content; what it used is taken off `input`.
    pub(crate) fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, String> {
        match self {
            Self::Sized(0) => Ok(Piece::End),
            Self::Sized(left) => Ok(take_up_to(left, input)),
            Self::UntilClose if input.is_empty() => Ok(Piece::NeedMore),
            Self::UntilClose => Ok(Piece::Data(std::mem::take(input))),
            Self::Chunked(state) => state.next(input),
        }
    }

    /// Whether a body may end where the connection did.
    pub(crate) fn may_end_here(&self) -> bool {
        matches!(self, Self::Sized(0) | Self::UntilClose | Self::Chunked(Chunked::End))
    }
}

/// As much of `left` as there is.
fn take_up_to<'a>(left: &mut u64, input: &mut &'a [u8]) -> Piece<'a> {
    if input.is_empty() {
        return Piece::NeedMore;
    }
    let count = usize::try_from(*left).map_or(input.len(), |left| left.min(input.len()));
    let (data, rest) = input.split_at(count);
    *left -= count as u64;
    *input = rest;
    Piece::Data(data)
}

impl Chunked {
    fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Piece<'a>, String> {
        loop {
            match self {
                Self::End => return Ok(Piece::End),
                Self::Data(0) => *self = Self::AfterData,
                Self::Data(left) => return Ok(take_up_to(left, input)),
                _ => {
                    let Some((&byte, rest)) = input.split_first() else { return Ok(Piece::NeedMore) };
                    *input = rest;
                    self.take_byte(byte)?;
                }
            }
        }
    }

    /// One byte of a line.
    fn take_byte(&mut self, byte: u8) -> Result<(), String> {
        match self {
            Self::Size { value, seen, .. } if byte == b'\n' => {
                if *seen == 0 {
                    return Err("a chunk without a size".into());
                }
                *self = if *value == 0 { Self::Trailer { line: 0, seen: 0 } } else { Self::Data(*value) };
            }
            Self::Size { value, seen, done } => {
                *seen += usize::from(byte != b'\r');
                let digit = (byte as char).to_digit(16);
                match digit.filter(|_| !*done) {
                    Some(digit) if *value >> 56 == 0 => *value = *value << 4 | u64::from(digit),
                    Some(_) => return Err("a chunk is too large".into()),
                    None if *done || b"\r; \t".contains(&byte) => *done = true,
                    None => return Err(format!("a chunk's size has the byte {byte:#04x}")),
                }
                if *seen > MAX_CHUNK_LINE {
                    return Err("the line of a chunk's size is too long".into());
                }
            }
            Self::AfterData => match byte {
                b'\n' => *self = Self::Size { value: 0, seen: 0, done: false },
                b'\r' => {}
                _ => return Err("a chunk is longer than its size".into()),
            },
            Self::Trailer { line: 0, .. } if byte == b'\n' => *self = Self::End,
            Self::Trailer { line, seen } => {
                *line = if byte == b'\n' { 0 } else { *line + usize::from(byte != b'\r') };
                *seen += 1;
                if *seen > MAX_HEAD_BYTES {
                    return Err("the trailers are too long".into());
                }
            }
            Self::Data(_) | Self::End => unreachable!("these take no single bytes"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The content of a chunked body that arrives in `pieces`, and what is left behind its end.
    fn chunked(pieces: &[&[u8]]) -> Result<(Vec<u8>, bool, usize), String> {
        let mut body = Body::Chunked(Chunked::Size { value: 0, seen: 0, done: false });
        let (mut content, mut ended, mut left) = (Vec::new(), false, 0);
        for piece in pieces {
            let mut input = *piece;
            loop {
                match body.next(&mut input)? {
                    Piece::Data(data) => content.extend_from_slice(data),
                    Piece::NeedMore => break,
                    Piece::End => {
                        ended = true;
                        left += input.len();
                        break;
                    }
                }
            }
        }
        Ok((content, ended, left))
    }

    #[test]
    fn chunks_do_not_depend_on_how_bytes_arrive() {
        let body = b"5\r\nhello\r\nC;name=\"value\"\r\n, world\r\n!!\n\r\n0\r\nx-trailer: 1\r\n\r\n";
        let expected = (b"hello, world\r\n!!\n".to_vec(), true, 0);
        // 12 bytes: `, world`, a line end, `!!`, a line feed.
        assert_eq!(chunked(&[body]).unwrap(), expected);
        let bytes: Vec<&[u8]> = body.chunks(1).collect();
        assert_eq!(chunked(&bytes).unwrap(), expected);
        for cut in 0..body.len() {
            assert_eq!(chunked(&[&body[..cut], &body[cut..]]).unwrap(), expected, "cut at {cut}");
        }
        assert!(!chunked(&[&body[..20]]).unwrap().1);
        assert_eq!(chunked(&[b"0\r\n\r\nHTTP"]).unwrap(), (Vec::new(), true, 4));
    }

    #[test]
    fn broken_chunks_are_refused() {
        for body in [&b"xyz\r\n"[..], b"\r\n", b"3\r\nabcd\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n"] {
            assert!(chunked(&[body]).is_err(), "{}", String::from_utf8_lossy(body));
        }
    }

    #[test]
    fn heads() {
        let parse = |text: &str| Head::parse(text.as_bytes());
        let text =
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n";
        let (head, length) = parse(text).unwrap().unwrap();
        assert!(head.status == 200 && head.keep_alive && matches!(head.body, Body::Chunked(_)));
        assert_eq!(&text[length..], "5\r\n");
        assert_eq!(parse(&text[..40]), Ok(None));
        let busy = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 2\r\nconnection: close\r\ncontent-length: 7\r\n\r\n";
        let (head, _) = parse(busy).unwrap().unwrap();
        assert_eq!(
            head,
            Head { status: 429, has_retry_after: true, keep_alive: false, body: Body::Sized(7) }
        );
        let (head, _) = parse("HTTP/1.1 200 OK\r\n\r\n").unwrap().unwrap();
        assert!(!head.keep_alive && head.body.may_end_here());
        for bad in ["HTTP/2 200\r\n\r\n", "SSH-2.0\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        assert!(parse(&"x".repeat(MAX_HEAD_BYTES + 1)).is_err());
    }

    #[test]
    fn sized_bodies_end_by_themselves() {
        let mut body = Body::Sized(5);
        let mut input = &b"abcdefg"[..];
        assert_eq!(body.next(&mut input), Ok(Piece::Data(b"abcde")));
        assert_eq!((body.next(&mut input), input), (Ok(Piece::End), &b"fg"[..]));
    }
}
