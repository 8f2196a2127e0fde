//! Plots in SVG, without a library: for pages of benchmarks and for files of simulations.

use std::fmt::Write;

pub(crate) const WIDTH: f64 = 560.0;
pub(crate) const HEIGHT: f64 = 220.0;
/// Room for the labels: left, right, top, bottom.
pub(crate) const MARGIN: (f64, f64, f64, f64) = (58.0, 14.0, 10.0, 34.0);
/// Of lines, in turn.
const COLORS: [&str; 8] =
    ["#3b6ea8", "#c8553d", "#5b8c5a", "#8a5fa8", "#c9a227", "#4aa3a2", "#8c6d5a", "#777777"];

/// Maps values to places in the picture.
pub(crate) struct Axes {
    pub(crate) x: (f64, f64),
    pub(crate) y_max: f64,
}

impl Axes {
    pub(crate) fn x(&self, value: f64) -> f64 {
        let share = (value - self.x.0) / (self.x.1 - self.x.0).max(1e-12);
        MARGIN.0 + share * (WIDTH - MARGIN.0 - MARGIN.1)
    }

    pub(crate) fn y(&self, value: f64) -> f64 {
        let share = value / self.y_max.max(1e-12);
        HEIGHT - MARGIN.3 - share * (HEIGHT - MARGIN.2 - MARGIN.3)
    }

    /// The picture with its scales around `content`.
    pub(crate) fn frame(&self, content: &str) -> String {
        let mut svg = format!("<svg width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\">");
        let right = WIDTH - MARGIN.1;
        for tick in 0..=4 {
            let value = self.y_max * f64::from(tick) / 4.0;
            let (y, left) = (self.y(value), MARGIN.0);
            // Writing to a string cannot fail.
            let _ = write!(svg, "<path d=\"M{left:.0} {y:.1}H{right:.0}\" stroke=\"#ddd\"/>");
            let (x, y) = (left - 6.0, y + 4.0);
            let _ =
                write!(svg, "<text x=\"{x:.0}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", short(value));
            let value = self.x.0 + (self.x.1 - self.x.0) * f64::from(tick) / 4.0;
            let (x, y) = (self.x(value), HEIGHT - MARGIN.3 + 18.0);
            let _ =
                write!(svg, "<text x=\"{x:.1}\" y=\"{y:.0}\" text-anchor=\"middle\">{}</text>", short(value));
        }
        svg + content + "</svg>"
    }

    /// A line through points, in the color of its number.
    pub(crate) fn line(&self, number: usize, points: &[(f64, f64)]) -> String {
        let place = |&(x, y): &(f64, f64)| format!("{:.1},{:.1}", self.x(x), self.y(y));
        let places: Vec<String> = points.iter().map(place).collect();
        let color = COLORS[number % COLORS.len()];
        format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>",
            places.join(" ")
        )
    }
}

/// Three digits.
fn short(value: f64) -> String {
    match value {
        0.0 => "0".into(),
        value if value >= 1e6 => format!("{:.3}M", value / 1e6).replace(".000", ""),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// A line and what it is.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A file with one plot: a title, lines from zero on, and their names.
pub(crate) fn document(title: &str, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|series| &series.points);
    let most = |part: fn(&(f64, f64)) -> f64| points().map(part).fold(0.0, f64::max);
    let axes = Axes { x: (0.0, most(|point| point.0).max(1e-9)), y_max: most(|point| point.1).max(1e-9) };
    let mut content = String::new();
    for (number, Series { name, points }) in series.iter().enumerate() {
        content += &axes.line(number, points);
        if series.len() > 1 {
            let (x, y) = (MARGIN.0 + 8.0, MARGIN.2 + 12.0 + 13.0 * number as f64);
            let color = COLORS[number % COLORS.len()];
            let _ =
                write!(content, "<text x=\"{x}\" y=\"{y}\" style=\"fill:{color}\">{}</text>", escaped(name));
        }
    }
    let (top, style) = (26.0, "text{font:11px system-ui,sans-serif;fill:#555}");
    let height = HEIGHT + top;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\
         <style>{style}</style><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\
         <text x=\"{}\" y=\"17\" style=\"font-size:13px\">{}</text><g transform=\"translate(0 {top})\">{}</g></svg>\n",
        MARGIN.0,
        escaped(title),
        axes.frame(&content)
    )
}

pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_holds_every_line_within_its_frame() {
        let series = |name: &str, slope: f64| Series {
            name: name.into(),
            points: (0..=10).map(|x| (f64::from(x), slope * f64::from(x))).collect(),
        };
        let svg = document("a < b", &[series("one", 1.0), series("two & more", 3.0)]);
        assert!(svg.contains("a &lt; b") && svg.contains("two &amp; more"));
        let lines: Vec<&str> =
            svg.split("points=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(lines.len(), 2);
        for place in lines.iter().flat_map(|line| line.split(' ')) {
            let (x, y) = place.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((MARGIN.0..=WIDTH - MARGIN.1).contains(&x), "{place}");
            assert!((MARGIN.2..=HEIGHT - MARGIN.3).contains(&y), "{place}");
        }
        assert!(
            lines[1].ends_with(&format!("{:.1},{:.1}", WIDTH - MARGIN.1, MARGIN.2)),
            "the top right corner"
        );
        assert!(document("none", &[]).contains("</svg>"));
    }
}
