//! What a benchmark says: rows with stable names for programs, tables for people, and the statistics behind both.

use std::io::Write;

use quire_core::DType;
use serde_json::{Map, Value, json};

use crate::args::Quantize;
use crate::units::Bytes;
use crate::{Failure, Result, machine};

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
}

/// Everything a command found out.
#[derive(Debug)]
pub(crate) struct Report {
    machine: Map<String, Value>,
    rows: Vec<Row>,
    /// For people.
    text: String,
}

impl Report {
    /// An empty report with what is known of this machine.
    pub(crate) fn new(threads: u32, device: &str) -> Self {
        let mut machine = Map::new();
        let mut put = |key: &str, value: Value| machine.insert(key.to_owned(), value);
        put("cpu", json!(machine::cpu_model()));
        put("cores", json!(machine::usable_cores()));
        put("threads", json!(threads));
        put("device", json!(device));
        put("simd", json!(machine::simd()));
        put("memory_bytes", json!(machine::total_memory().map(|Bytes(bytes)| bytes)));
        put("load_average", json!(machine::load_average()));
        put("quire", json!(env!("CARGO_PKG_VERSION")));
        let load = machine::load_average().map_or_else(String::new, |load| format!("; load average {load}"));
        Self { machine, rows: Vec::new(), text: format!("machine  {device}{load}\n") }
    }

    /// Adds something measured about the machine.
    pub(crate) fn machine(&mut self, key: &str, value: f64) {
        self.machine.insert(key.to_owned(), json!(rounded(value)));
    }

    /// Adds a figure.
    pub(crate) fn row(&mut self, name: String, value: f64, unit: &'static str) {
        self.rows.push(Row { name, value: rounded(value), unit });
    }

    /// The figures so far.
    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Adds a paragraph for people.
    pub(crate) fn text(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// Prints the report in one of its two forms.
    pub(crate) fn print(&self, as_json: bool, out: &mut impl Write) -> Result<()> {
        let printed = if as_json { writeln!(out, "{}", self.json()) } else { write!(out, "{}", self.text) };
        printed.map_err(Failure::output)
    }

    /// What programs read.
    pub(crate) fn json(&self) -> Value {
        let row = |row: &Row| json!({ "name": row.name, "value": row.value, "unit": row.unit });
        json!({ "machine": self.machine, "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

/// What the rows call a model: the last part of its name, in lower case, in characters that need no quoting.
pub(crate) fn slug(name: &str) -> String {
    let last = name.trim_end_matches('/').rsplit('/').next().unwrap_or(name);
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    last.to_lowercase().chars().map(plain).collect()
}

/// What the rows call the weights' format.
pub(crate) fn format_word(dtype: DType, quantize: Quantize) -> &'static str {
    if quantize == Quantize::None { dtype.name() } else { quantize.word() }
}

/// Columns aligned for reading: the first to the left, the others to the right.
pub(crate) fn table(header: &[&str], lines: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&word| word.to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(lines).collect();
    let width = |column: usize| all.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for line in all {
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let cell = if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
            text.push_str(&cell);
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// The value below which `share` (0 to 1) of `values` lie, interpolated between neighbours as numpy does; 0 for none.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let place = share.clamp(0.0, 1.0) * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

/// The middle of `values`.
pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// Five significant digits: more would be noise.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let digits = 10f64.powi(4 - value.abs().log10().floor() as i32);
    (value * digits).round() / digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_short_plain_names() {
        assert_eq!(slug("Qwen/Qwen3-0.6B"), "qwen3-0.6b");
        assert_eq!(slug("llama-3.2-1b"), "llama-3.2-1b");
        assert_eq!(slug("My Model (v2)"), "my-model--v2-");
        assert_eq!(slug("a/b/"), "b");
        assert_eq!(format_word(DType::BF16, Quantize::None), "bf16");
        assert_eq!(format_word(DType::BF16, Quantize::Int8), "int8");
    }

    #[test]
    fn percentiles_are_numpys() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(median(&values), 2.5);
        assert!((percentile(&values, 0.9) - 3.7).abs() < 1e-12);
        assert_eq!((percentile(&values, 0.0), percentile(&values, 1.0)), (1.0, 4.0));
        assert_eq!((median(&[7.0]), median(&[])), (7.0, 0.0));
    }

    #[test]
    fn figures_keep_five_digits() {
        assert_eq!(rounded(123_456.7), 123_460.0);
        assert_eq!(rounded(0.012_345_67), 0.012_346);
        assert_eq!((rounded(0.0), rounded(f64::NAN)), (0.0, 0.0));
    }

    #[test]
    fn json_is_the_contract() {
        let mut report = Report::new(2, "cpu");
        report.row("decode_tok_s/m/1/bf16".into(), 12.345_678, "tok/s");
        let mut out = Vec::new();
        report.print(true, &mut out).unwrap();
        let value: Value = serde_json::from_slice(&out).unwrap();
        let row = json!({ "name": "decode_tok_s/m/1/bf16", "value": 12.346, "unit": "tok/s" });
        assert_eq!(value["rows"], json!([row]));
        assert_eq!(value["machine"]["threads"], 2);
    }

    #[test]
    fn tables_align() {
        let text = table(&["op", "ms"], &[vec!["attention".into(), "1.0".into()]]);
        assert_eq!(text, "op          ms\nattention  1.0\n");
    }
}
