//! Line charts as SVG, just enough for sweeps and comparisons: panels over a common abscissa, one
//! or more lines in each.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const PANEL: f64 = 240.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 40.0;
/// Horizontal lines of a panel.
const STEPS: u32 = 4;
/// Of the lines of a panel, in turn: they differ in lightness as well.
const COLOURS: [&str; 5] = ["#1f5fa8", "#d9730d", "#3a9a3a", "#8e3b9e", "#7a7a7a"];

/// How the abscissa is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// In equal steps.
    Linear,
    /// In equal factors; values are above 0.
    Logarithmic,
}

/// One line.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    /// What it shows; drawn where a panel has several.
    pub name: &'a str,
    /// Abscissa and ordinate.
    pub points: Vec<(f64, f64)>,
}

/// Lines over one ordinate.
#[derive(Clone, Debug)]
pub struct Panel<'a> {
    /// What the ordinate is.
    pub name: &'a str,
    /// Its lines.
    pub lines: Vec<Line<'a>>,
}

/// The next round number (1, 2 or 5 times a power of ten).
fn round_up(value: f64) -> f64 {
    if value.is_nan() || value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    let factors = [1.0, 2.0, 5.0, 10.0];
    let enough = factors.iter().find(|factor| *factor * power >= value);
    enough.unwrap_or(&10.0) * power
}

/// Text as it may stand between tags.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Draws the panels one below the other, `label` under each abscissa.
pub fn draw(label: &str, scale: Scale, panels: &[Panel<'_>]) -> String {
    let height = PANEL * panels.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let label = escape(label);
    for (n, one) in panels.iter().enumerate() {
        panel(&mut svg, PANEL * n as f64, &label, scale, one);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, y0: f64, label: &str, scale: Scale, panel: &Panel<'_>) {
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let place = |x: f64| match scale {
        Scale::Linear => x,
        Scale::Logarithmic => x.max(f64::MIN_POSITIVE).log2(),
    };
    let places = points().map(|point| place(point.0));
    let (first, last) = places.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
    let top = round_up(points().map(|point| point.1).fold(0.0, f64::max));
    let span = if last > first { last - first } else { 1.0 };
    let x = |value: f64| LEFT + (place(value) - first) / span * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| y0 + PANEL - BOTTOM - value / top * (PANEL - TOP - BOTTOM);
    // Writing to a String cannot fail.
    let mut put = |text: std::fmt::Arguments<'_>| svg.write_fmt(text).unwrap_or(());
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>\n",
        y0 + TOP - 12.0,
        escape(panel.name)
    ));
    for step in 0..=STEPS {
        let value = top * f64::from(step) / f64::from(STEPS);
        let at = y(value);
        put(format_args!(
            "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#ccc\"/>\n\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{value}</text>\n",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        ));
    }
    let mut marks: Vec<f64> = points().map(|point| point.0).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for mark in marks {
        put(format_args!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mark}</text>\n",
            x(mark),
            y(0.0) + 16.0
        ));
    }
    put(format_args!(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\n",
        WIDTH / 2.0,
        y0 + PANEL - 6.0
    ));
    for (n, one) in panel.lines.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        line(svg, one, colour, x, y);
        if panel.lines.len() > 1 {
            let behind = (panel.lines.len() - 1 - n) as f64;
            let _ = writeln!(
                svg,
                "<text x=\"{}\" y=\"{}\" fill=\"{colour}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT - 100.0 * behind,
                y0 + TOP - 12.0,
                escape(one.name)
            );
        }
    }
}

fn line(
    svg: &mut String,
    line: &Line<'_>,
    colour: &str,
    x: impl Fn(f64) -> f64,
    y: impl Fn(f64) -> f64,
) {
    let mut path = String::new();
    for (px, py) in &line.points {
        let (cx, cy) = (x(*px), y(*py));
        let _ = write!(path, "{cx:.1},{cy:.1} ");
        let _ = writeln!(
            svg,
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\" fill=\"{colour}\"><title>{px}: {py:.3}</title></circle>"
        );
    }
    let _ = writeln!(
        svg,
        "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_end_at_round_numbers() {
        let cases = [
            (0.0, 1.0),
            (0.7, 1.0),
            (8.4, 10.0),
            (12.0, 20.0),
            (43.0, 50.0),
        ];
        assert!(cases.iter().all(|(value, top)| round_up(*value) == *top));
        assert_eq!(round_up(f64::NAN), 1.0);
    }

    fn one<'a>(name: &'a str, points: Vec<(f64, f64)>) -> Panel<'a> {
        let line = Line { name, points };
        let lines = vec![line];
        Panel { name, lines }
    }

    #[test]
    fn every_point_is_drawn_and_one_point_is_enough() {
        let panel = one("Mpps", vec![(64.0, 8.0), (1500.0, 2.0)]);
        let svg = draw("size", Scale::Linear, &[panel]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("cx=\"60.0\"") && svg.ends_with("</svg>\n"));
        for scale in [Scale::Linear, Scale::Logarithmic] {
            let panels = [one("one", vec![(64.0, 8.0)]), one("none", vec![])];
            let svg = draw("size", scale, &panels);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn equal_factors_are_equal_steps_and_names_stand_beside_their_lines() {
        let points = vec![(1.0, 1.0), (8.0, 1.0), (64.0, 1.0)];
        let line = |name| Line {
            name,
            points: points.clone(),
        };
        let panel = Panel {
            name: "a < b",
            lines: vec![line("first"), line("second")],
        };
        let svg = draw("x", Scale::Logarithmic, &[panel]);
        assert_eq!(svg.matches("cx=\"340.0\"").count(), 2, "{svg}");
        assert!(svg.contains(">first<") && svg.contains(">second<"));
        assert!(svg.contains(">a &lt; b<"));
        assert_eq!(svg.matches(">64</text>").count(), 1, "one mark a value");
    }
}
