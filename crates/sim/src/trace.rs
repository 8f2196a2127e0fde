//! Recorded request traces: when requests came, how long they were, and which prefixes they shared.
//!
//! Two public formats are read, plain or compressed with gzip, told apart by their content:
//! * Azure LLM inference 2023 (CSV): `TIMESTAMP,ContextTokens,GeneratedTokens`; nothing about prefixes
//!   (Patel et al., Splitwise, ISCA 2024);
//! * Mooncake (JSON lines): `timestamp` in milliseconds, `input_length`, `output_length`, and `hash_ids`, one per 512
//!   tokens, equal where everything up to and including the block is equal (Qin et al., Mooncake, FAST 2025).
//!
//! Some recorders quantise time. Requests with equal timestamps are spread evenly up to the next one, so that bursts
//! which never happened do not decide a simulation.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use quire_core::Micros;
use serde::Deserialize;

/// Tokens that one entry of [`TraceRequest::blocks`] stands for.
pub const TRACE_BLOCK_SIZE: u32 = 512;

/// The gap after the last group of equal timestamps, which has no successor to tell.
const LAST_GAP: u64 = 1_000_000;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceRequest {
    /// Since the trace began.
    pub arrival: Micros,
    /// Prompt length; at least 1.
    pub input_tokens: u32,
    /// Length of the answer; at least 1.
    pub output_tokens: u32,
    /// Names of the prompt's blocks of 512 tokens, the last one perhaps partial. Equal names mean equal tokens up to
    /// and including the block. Empty if the trace does not say.
    pub blocks: Vec<u64>,
}

type ParseLine = fn(&str) -> Result<TraceRequest, String>;

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file itself.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// One line of it.
    #[error("{}, line {line}: {message}", path.display())]
    Line {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
}

/// Reads a trace file, ordered by arrival.
///
/// # Errors
/// If the file cannot be read, is neither format, or a line is malformed; with the line's number.
pub fn read_trace(path: &Path) -> Result<Vec<TraceRequest>, TraceError> {
    let failed = |source| TraceError::Io { path: path.to_owned(), source };
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let compressed = file.fill_buf().map_err(failed)?.starts_with(&[0x1f, 0x8b]);
    let text: Box<dyn Read> = if compressed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut lines = Vec::new();
    for line in BufReader::new(text).lines() {
        lines.push(line.map_err(failed)?);
    }
    parse_trace(&lines).map_err(|(line, message)| TraceError::Line { path: path.to_owned(), line, message })
}

/// The requests of a trace's lines, or the number of the first bad one and what is wrong with it.
fn parse_trace(lines: &[String]) -> Result<Vec<TraceRequest>, (usize, String)> {
    const AZURE_HEADER: &str = "TIMESTAMP,ContextTokens,GeneratedTokens";
    let first = lines.first().map_or("", |line| line.trim());
    let (parse, skip): (ParseLine, usize) = if first == AZURE_HEADER {
        (parse_azure, 1)
    } else if first.starts_with('{') {
        (parse_mooncake, 0)
    } else {
        return Err((1, format!("expected `{AZURE_HEADER}` or a JSON object")));
    };
    let mut requests = Vec::with_capacity(lines.len());
    for (line, number) in lines.iter().zip(1..).skip(skip) {
        if line.trim().is_empty() {
            continue;
        }
        let request = parse(line.trim()).map_err(|message| (number, message))?;
        if request.input_tokens == 0 || request.output_tokens == 0 {
            return Err((number, "a request needs at least one input and one output token".into()));
        }
        requests.push(request);
    }
    // Stable: requests of one instant keep the order of the file.
    requests.sort_by_key(|request| request.arrival);
    let start = requests.first().map_or(0, |request| request.arrival.0);
    for request in &mut requests {
        request.arrival.0 -= start;
    }
    spread_equal_arrivals(&mut requests);
    Ok(requests)
}

fn spread_equal_arrivals(requests: &mut [TraceRequest]) {
    let mut start = 0;
    while start < requests.len() {
        let at = requests[start].arrival.0;
        let len = requests[start..].iter().take_while(|request| request.arrival.0 == at).count();
        let next = requests.get(start + len).map_or(at + LAST_GAP, |request| request.arrival.0);
        for (n, request) in requests[start..start + len].iter_mut().enumerate() {
            request.arrival.0 = at + (next - at) * n as u64 / len as u64;
        }
        start += len;
    }
}

fn parse_mooncake(line: &str) -> Result<TraceRequest, String> {
    #[derive(Deserialize)]
    struct Line {
        timestamp: u64,
        input_length: u32,
        output_length: u32,
        hash_ids: Vec<u64>,
    }
    let line: Line = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let blocks = line.input_length.div_ceil(TRACE_BLOCK_SIZE) as usize;
    if line.hash_ids.len() != blocks {
        return Err(format!(
            "{} hash_ids for {blocks} blocks of {TRACE_BLOCK_SIZE} tokens",
            line.hash_ids.len()
        ));
    }
    Ok(TraceRequest {
        arrival: Micros(line.timestamp.checked_mul(1000).ok_or("the timestamp is out of range")?),
        input_tokens: line.input_length,
        output_tokens: line.output_length,
        blocks: line.hash_ids,
    })
}

fn parse_azure(line: &str) -> Result<TraceRequest, String> {
    let mut fields = line.split(',');
    let (Some(time), Some(input), Some(output), None) =
        (fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return Err("expected three fields: time, input tokens, output tokens".into());
    };
    let tokens = |name: &str, text: &str| {
        text.parse().map_err(|_| format!("{name} `{text}` is not a number of tokens"))
    };
    Ok(TraceRequest {
        arrival: Micros(parse_time(time).ok_or_else(|| {
            format!("`{time}` is not a time; expected for example 2023-11-16 18:15:46.6805900")
        })?),
        input_tokens: tokens("ContextTokens", input)?,
        output_tokens: tokens("GeneratedTokens", output)?,
        blocks: Vec::new(),
    })
}

/// Microseconds since 1970 of `YYYY-MM-DD hh:mm:ss.fffffff`; `None` for anything else.
fn parse_time(text: &str) -> Option<u64> {
    let (date, clock) = text.split_once([' ', 'T'])?;
    let clock = clock.strip_suffix("+00:00").or(clock.strip_suffix('Z')).unwrap_or(clock);
    let number = |text: &str, low: u64, high: u64| {
        let number = text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())??;
        (low..=high).contains(&number).then_some(number)
    };
    let mut date = date.splitn(3, '-');
    let year = number(date.next()?, 1970, 9999)?;
    let month = number(date.next()?, 1, 12)?;
    let day = number(date.next()?, 1, 31)?;
    let mut clock = clock.splitn(3, ':');
    let hour = number(clock.next()?, 0, 23)?;
    let minute = number(clock.next()?, 0, 59)?;
    let (second, fraction) = {
        let seconds = clock.next()?;
        seconds.split_once('.').unwrap_or((seconds, "0"))
    };
    let second = number(second, 0, 60)?;
    let digits = fraction.len().min(6);
    let micros = number(fraction, 0, u64::MAX).and(number(&fraction[..digits], 0, 999_999))?;
    let micros = micros * 10_u64.pow(6 - digits as u32);
    Some((((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second) * 1_000_000 + micros)
}

/// The Gregorian calendar, with years that begin in March so that the leap day comes last.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<TraceRequest>, (usize, String)> {
        parse_trace(&text.lines().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn reads_both_formats() {
        let azure = parse(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-30 23:59:59.6805900,374,44\n\
             2023-12-01 00:00:03.9951690,396,109\n",
        );
        let azure = azure.unwrap();
        assert_eq!(
            azure[0],
            TraceRequest { arrival: Micros(0), input_tokens: 374, output_tokens: 44, blocks: vec![] }
        );
        assert_eq!(azure[1].arrival, Micros(4_314_579));
        let mooncake = parse(
            "{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}\n\
             {\"timestamp\": 0, \"input_length\": 512, \"output_length\": 6, \"hash_ids\": [0]}\n\
             {\"timestamp\": 3000, \"input_length\": 1, \"output_length\": 7, \"hash_ids\": [2]}\n",
        );
        let mooncake = mooncake.unwrap();
        assert_eq!(mooncake[0].blocks, [0, 1]);
        let arrivals: Vec<u64> = mooncake.iter().map(|request| request.arrival.0).collect();
        assert_eq!(arrivals, [0, 1_500_000, 3_000_000], "equal times are spread over the gap");
    }

    #[test]
    fn a_bad_line_is_named() {
        let header = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        let good = "2023-11-16 18:15:46.6805900,374,44\n";
        for (text, line, words) in [
            ("", 1, "expected `TIMESTAMP"),
            ("a,b\n", 1, "JSON object"),
            (&format!("{header}{good}2023-11-16,1,2\n"), 3, "is not a time"),
            (&format!("{header}2023-13-16 00:00:00,1,2\n"), 2, "is not a time"),
            (&format!("{header}2023-11-16 00:00:00.é,1,2\n"), 2, "is not a time"),
            (&format!("{header}{good}\n{good}2023-11-16 00:00:00,-1,2\n"), 5, "ContextTokens `-1`"),
            (&format!("{header}2023-11-16 00:00:00,1\n"), 2, "three fields"),
            (&format!("{header}2023-11-16 00:00:00,0,4\n"), 2, "at least one"),
            ("{\"timestamp\": 1}\n", 1, "missing field `input_length`"),
            (
                "{\"timestamp\": 0, \"input_length\": 513, \"output_length\": 5, \"hash_ids\": [0]}\n",
                1,
                "1 hash_ids for 2 blocks",
            ),
        ] {
            let (at, message) = parse(text).unwrap_err();
            assert_eq!(at, line, "{text}: {message}");
            assert!(message.contains(words), "{text}: {message}");
        }
        let missing = read_trace(Path::new("no/such/file")).unwrap_err().to_string();
        assert!(missing.starts_with("cannot read no/such/file:"), "{missing}");
    }
}
