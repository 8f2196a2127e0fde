//! A page about one run that needs nothing but a browser: figures, and plots drawn in SVG.

use std::fmt::Write;

use super::args::Metric;
use super::run::{Measured, Sample};
use super::summary::values;
use crate::bench::report::Report;
use crate::svg::{Axes, HEIGHT, MARGIN, escaped};

const BINS: usize = 48;
/// Points of a line at most.
const POINTS: usize = 240;
/// Values beyond this share of all are not drawn: a few of them would flatten the rest.
const SHOWN_SHARE: f64 = 0.995;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1200px;margin:2em auto;padding:0 1em}\
h1{font-size:1.4em}h2{font-size:1em;margin:0 0 .3em}.plots{display:flex;flex-wrap:wrap;gap:24px}\
svg{background:#fafafa;border:1px solid #ddd}svg text{font:11px system-ui,sans-serif;fill:#555}\
table{border-collapse:collapse;margin-top:2em}td{padding:1px 14px 1px 0;border-bottom:1px solid #eee}\
td:nth-child(2){text-align:right;font-variant-numeric:tabular-nums}p{color:#555}";

/// The whole page.
pub(crate) fn page(what: &str, report: &Report, measured: &Measured) -> String {
    let ttft: Vec<(f64, u64)> = values(measured, Metric::Ttft).into_iter().map(|value| (value, 1)).collect();
    let gaps: Vec<(f64, u64)> = measured.gaps.buckets().collect();
    let rate = rates(&measured.samples);
    let in_flight = thinned(&measured.samples, |sample| (sample.at, f64::from(sample.in_flight)));
    let plots = [
        ("Time to the first token, requests by milliseconds", bars(&ttft)),
        ("Time between events, events by milliseconds", bars(&gaps)),
        ("Events with tokens per second, by seconds since the start", line(&rate)),
        ("Requests on their way, by seconds since the start", line(&in_flight)),
    ];
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>quire bench serve</title>\
         <style>{STYLE}</style></head>\n<body><h1>quire bench serve</h1><p>{}</p>\n<div class=\"plots\">\n",
        escaped(what)
    );
    for (title, svg) in plots {
        page += &format!("<section><h2>{title}</h2>{svg}</section>\n");
    }
    page += "</div>\n<table>\n";
    for row in report.rows() {
        page +=
            &format!("<tr><td>{}</td><td>{}</td><td>{}</td></tr>\n", escaped(&row.name), row.value, row.unit);
    }
    page += "</table>\n</body></html>\n";
    page
}

/// Events per second between samples, as `(seconds, rate)`.
fn rates(samples: &[Sample]) -> Vec<(f64, f64)> {
    let counts = thinned(samples, |sample| (sample.at, sample.num_events as f64));
    let rate = |pair: &[(f64, f64)]| (pair[1].0, (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0).max(1e-6));
    counts.windows(2).map(rate).collect()
}

/// At most about [`POINTS`] of the samples, evenly chosen, and the last.
fn thinned(samples: &[Sample], point: impl Fn(&Sample) -> (f64, f64)) -> Vec<(f64, f64)> {
    let step = samples.len().div_ceil(POINTS).max(1);
    let last = samples.last().filter(|_| !(samples.len().max(1) - 1).is_multiple_of(step));
    samples.iter().step_by(step).chain(last).map(point).collect()
}

/// A histogram of weighted values in seconds, drawn in milliseconds.
fn bars(values: &[(f64, u64)]) -> String {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: u64 = sorted.iter().map(|(_, count)| count).sum();
    let Some(&(least, _)) = sorted.first() else { return "<p>none</p>".into() };
    let mut left = (total as f64 * SHOWN_SHARE).ceil() as u64;
    let shown = sorted.iter().take_while(|(_, count)| {
        let is_shown = left > 0;
        left = left.saturating_sub(*count);
        is_shown
    });
    let most = shown.last().map_or(least, |&(value, _)| value);
    // A single value still has a bin around it.
    let width = ((most - least) / BINS as f64).max(1e-6);
    let mut bins = [0u64; BINS];
    let mut beyond = 0;
    for &(value, count) in &sorted {
        if value > most {
            beyond += count;
        } else {
            bins[(((value - least) / width) as usize).min(BINS - 1)] += count;
        }
    }
    let y_max = bins.iter().copied().max().unwrap_or(1) as f64;
    let axes = Axes { x: (least * 1e3, (least + width * BINS as f64) * 1e3), y_max };
    let mut content = String::new();
    for (bin, &count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let at = |bin: usize| axes.x((least + width * bin as f64) * 1e3);
        let (x, y) = (at(bin), axes.y(count as f64));
        let (width, height) = (at(bin + 1) - x - 0.5, HEIGHT - MARGIN.3 - y);
        let _ = write!(
            content,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"#3b6ea8\"><title>{count}</title></rect>"
        );
    }
    let note = if beyond > 0 { format!("<p>{beyond} more to the right</p>") } else { String::new() };
    axes.frame(&content) + &note
}

/// A line through points.
fn line(points: &[(f64, f64)]) -> String {
    if points.len() < 2 {
        return "<p>too short a run</p>".into();
    }
    let y_max = points.iter().map(|point| point.1).fold(1.0, f64::max);
    let axes = Axes { x: (0.0, points[points.len() - 1].0), y_max };
    axes.frame(&axes.line(0, points))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_hold_every_value_or_say_so() {
        let values: Vec<(f64, u64)> =
            (0..1000).map(|i| (f64::from(i) * 1e-3, 1)).chain([(50.0, 2)]).collect();
        let svg = bars(&values);
        let titles = svg.split("<title>").skip(1).map(|rest| rest.split('<').next().unwrap());
        let drawn: u64 = titles.map(|count| count.parse::<u64>().unwrap()).sum();
        let note = svg.rsplit("<p>").next().unwrap().split(' ').next().unwrap();
        assert_eq!(drawn + note.parse::<u64>().unwrap(), 1002);
        assert!(drawn >= 997, "{drawn}");
        assert!(bars(&[(0.01, 5)]).contains("<title>5</title>"));
        assert_eq!(bars(&[]), "<p>none</p>");
    }

    #[test]
    fn lines_end_where_the_samples_do() {
        let sample =
            |at: u32| Sample { at: f64::from(at), num_events: u64::from(at) * 7, ..Sample::default() };
        let samples: Vec<Sample> = (0..1001).map(sample).collect();
        let rates = rates(&samples);
        assert!(rates.len() <= POINTS + 1 && rates.last().unwrap().0 == 1000.0);
        assert!(rates.iter().all(|(_, rate)| (rate - 7.0).abs() < 1e-9));
        assert!(line(&rates).contains("<polyline"));
        assert!(line(&rates[..1]).contains("too short"));
    }

    #[test]
    fn the_page_needs_nothing_else() {
        let mut report = Report::new(1, "x");
        report.row("ttft_ms_p50".into(), 12.5, "ms");
        let page = page("client of <b>", &report, &Measured::default());
        assert!(page.contains("ttft_ms_p50</td><td>12.5</td>") && page.contains("&lt;b&gt;"));
        assert!(!page.contains("<script") && !page.contains("http://") && !page.contains("https://"));
    }
}
