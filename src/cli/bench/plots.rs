//! Plots, as SVG to stand in a page.
//!
//! Each colour is one that the page's style sheet gives another meaning to by the attribute it stands in, for light and for
//! dark; see [`super::page`].

use std::fmt::Write;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// Size in pixels; the page shrinks it where it has less room.
const SIZE: (u32, u32) = (720, 300);
/// Colours of lines and areas, in their order.
pub(super) const INKS: [RGBColor; 5] = [
    RGBColor(0x2a, 0x78, 0xd6),
    RGBColor(0xc2, 0x57, 0x0c),
    RGBColor(0x1a, 0x7f, 0x37),
    RGBColor(0x82, 0x50, 0xdf),
    RGBColor(0x6e, 0x77, 0x81),
];
/// Of axes' labels.
pub(super) const TEXT: RGBColor = RGBColor(0x24, 0x29, 0x2f);
/// Of axes.
pub(super) const AXIS: RGBColor = RGBColor(0x8c, 0x95, 0x9f);
/// Of the lines behind a plot.
pub(super) const GRID: RGBColor = RGBColor(0xe1, 0xe4, 0xe8);

/// A plot that could not be drawn, which would be a fault of ours: the data is numbers.
pub(super) type PlotError = Box<dyn std::error::Error + Send + Sync>;

/// What a line is of, and its points.
pub(super) struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// What the axes say.
pub(super) struct Axes<'a> {
    pub x: &'a str,
    pub y: &'a str,
    /// Says in a sentence what is shown, for those who do not see it.
    pub title: &'a str,
}

/// The name of a colour as SVG has it.
pub(super) fn hex(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// Rates over spans of time, as a line of steps.
pub(super) fn steps(rates: &[(f64, f64, f64)], scale: f64) -> Vec<(f64, f64)> {
    rates.iter().flat_map(|&(from, to, rate)| [(from, rate / scale), (to, rate / scale)]).collect()
}

/// Lines over a common axis from zero; `dots` marks their points, which are then at whole numbers.
pub(super) fn lines(axes: &Axes<'_>, lines: &[Line], dots: bool) -> Result<String, PlotError> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let (x_max, y_max) = (most(points().map(|p| p.0)), most(points().map(|p| p.1)));
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = chart(&root, 0.0..x_max * 1.02, y_max * 1.08, axes, dots)?;
        for (line, ink) in lines.iter().zip(INKS.iter().cycle()) {
            chart.draw_series(LineSeries::new(line.points.iter().copied(), ink.stroke_width(2)))?;
            if dots {
                let dot = |&point: &(f64, f64)| Circle::new(point, 4, ink.filled());
                chart.draw_series(line.points.iter().map(dot))?;
            }
        }
        drop(chart);
        root.present()?;
    }
    Ok(figure(axes.title, lines.iter().map(|line| line.name.as_str()), &svg))
}

/// For each bar, numbered from 1, shares that add up to 1, or all 0, of `names`, from below.
pub(super) fn shares(axes: &Axes<'_>, names: &[&str], bars: &[Vec<f64>]) -> Result<String, PlotError> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let mut chart = chart(&root, 0.5..bars.len().max(1) as f64 + 0.5, 100.0, axes, true)?;
        for (number, bar) in (1..).zip(bars) {
            let (left, right) = (f64::from(number) - 0.44, f64::from(number) + 0.44);
            let mut below = 0.0;
            for (share, ink) in bar.iter().zip(INKS).filter(|(share, _)| **share > 0.0) {
                let above = below + share * 100.0;
                chart.draw_series([Rectangle::new([(left, below), (right, above)], ink.filled())])?;
                below = above;
            }
        }
        drop(chart);
        root.present()?;
    }
    Ok(figure(axes.title, names.iter().copied(), &svg))
}

/// The greatest number, and something above 0 where there is none.
fn most(numbers: impl Iterator<Item = f64>) -> f64 {
    let most = numbers.filter(|number| number.is_finite()).fold(0.0, f64::max);
    if most > 0.0 { most } else { 1.0 }
}

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Axes with their labels; those of `x` only at whole numbers, where it counts something.
fn chart<'a, 'b>(
    root: &'a DrawingArea<SVGBackend<'b>, Shift>,
    x: Range<f64>,
    y_max: f64,
    axes: &Axes<'_>,
    counts: bool,
) -> Result<Chart<'a, 'b>, PlotError> {
    let mut chart = ChartBuilder::on(root)
        .margin_top(8)
        .margin_right(16)
        .x_label_area_size(48)
        .y_label_area_size(72)
        .build_cartesian_2d(x, 0.0..y_max)?;
    let font = ("sans-serif", 16).into_font().color(&TEXT);
    let number = |x: &f64| if counts && (x - x.round()).abs() > 1e-6 { String::new() } else { tick(*x) };
    let plain = |x: &f64| tick(*x);
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(AXIS)
        .label_style(font.clone())
        .axis_desc_style(font)
        .x_desc(axes.x)
        .y_desc(axes.y)
        .y_labels(6)
        .x_labels(10)
        .x_label_formatter(&number)
        .y_label_formatter(&plain);
    if counts {
        mesh.disable_x_mesh();
    }
    mesh.draw()?;
    Ok(chart)
}

/// A number on an axis, with no more digits than it needs.
fn tick(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A plot with its legend.
fn figure<'a>(title: &str, names: impl Iterator<Item = &'a str>, svg: &str) -> String {
    let mut legend = String::new();
    for (name, ink) in names.zip(0..) {
        // Writing to a String cannot fail.
        let _ = write!(
            legend,
            "<span class=\"key\"><i class=\"ink{}\"></i>{}</span>",
            ink % INKS.len(),
            escape(name)
        );
    }
    let title = escape(title);
    let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{title}\" "), 1);
    format!("<figure><figcaption>{title}</figcaption><div class=\"keys\">{legend}</div>{svg}</figure>\n")
}

/// Text for HTML.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const AXES: Axes<'static> = Axes { x: "seconds", y: "GB/s", title: "a < b" };

    #[test]
    fn lines_have_their_colours_and_legend() {
        let line = |name: &str| Line { name: name.into(), points: vec![(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)] };
        let plot = lines(&AXES, &[line("logical"), line("wire")], true).unwrap();
        let of_ink = |ink: RGBColor| {
            let lines = plot.lines().filter(|line| line.contains("<polyline") && line.contains(&hex(ink)));
            lines.count()
        };
        assert_eq!((of_ink(INKS[0]), of_ink(INKS[1]), of_ink(INKS[2])), (1, 1, 0), "{plot}");
        assert_eq!(plot.matches("<circle").count(), 6, "{plot}");
        for expected in [&hex(INKS[0]), &hex(INKS[1]), "a &lt; b", ">wire</span>", "seconds", "GB/s"] {
            assert!(plot.contains(expected), "{expected}: {plot}");
        }
    }

    #[test]
    fn plots_of_nothing_and_of_much_are_plots() {
        assert!(lines(&AXES, &[], false).unwrap().contains("</svg>"));
        let line = Line { name: "one".into(), points: vec![(0.0, 0.0), (f64::NAN, 1e12)] };
        assert!(lines(&AXES, &[line], false).unwrap().contains("</svg>"));
        assert!(shares(&AXES, &["raw"], &[]).unwrap().contains("</svg>"));
        let many = vec![vec![0.5, 0.0, 0.5]; 1000];
        let plot = shares(&AXES, &["raw", "zstd", "zero"], &many).unwrap();
        assert_eq!(plot.matches(&format!("fill=\"{}\"", hex(INKS[2]))).count(), 1000);
    }

    #[test]
    fn numbers_on_axes_are_short() {
        assert_eq!([tick(0.0), tick(2.0), tick(0.25), tick(1.0 / 3.0)], ["0", "2", "0.25", "0.333"]);
    }
}
