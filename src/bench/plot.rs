//! Line charts as SVG, just enough for a sweep: one panel for each series, over a common abscissa.

use std::fmt::Write;

const WIDTH: f64 = 640.0;
const PANEL: f64 = 240.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 40.0;
/// Horizontal lines of a panel.
const STEPS: u32 = 4;

/// One line.
#[derive(Clone, Debug)]
pub struct Series<'a> {
    /// What the ordinate is.
    pub name: &'a str,
    /// Abscissa and ordinate.
    pub points: Vec<(f64, f64)>,
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

/// Draws each series in a panel of its own, `label` under the abscissa.
pub fn lines(label: &str, series: &[Series<'_>]) -> String {
    let height = PANEL * series.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (n, one) in series.iter().enumerate() {
        panel(&mut svg, PANEL * n as f64, label, one);
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, y0: f64, label: &str, series: &Series<'_>) {
    let xs = series.points.iter().map(|point| point.0);
    let (first, last) = xs.fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(x), b.max(x)));
    let top = round_up(series.points.iter().map(|p| p.1).fold(0.0, f64::max));
    let span = (last - first).max(1.0);
    let x = |value: f64| LEFT + (value - first) / span * (WIDTH - LEFT - RIGHT);
    let y = |value: f64| y0 + PANEL - BOTTOM - value / top * (PANEL - TOP - BOTTOM);
    // Writing to a String cannot fail.
    let mut put = |text: std::fmt::Arguments<'_>| svg.write_fmt(text).unwrap_or(());
    put(format_args!(
        "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{}</text>\n",
        y0 + TOP - 12.0,
        series.name
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
    let mut path = String::new();
    for (px, py) in &series.points {
        let (cx, cy) = (x(*px), y(*py));
        let _ = write!(path, "{cx:.1},{cy:.1} ");
        put(format_args!(
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3\" fill=\"#1f5fa8\"><title>{px}: {py:.3}</title></circle>\n\
             <text x=\"{cx:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{px}</text>\n",
            y(0.0) + 16.0
        ));
    }
    put(format_args!(
        "<polyline points=\"{path}\" fill=\"none\" stroke=\"#1f5fa8\" stroke-width=\"2\"/>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\n",
        WIDTH / 2.0,
        y0 + PANEL - 6.0
    ));
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

    #[test]
    fn every_point_is_drawn_and_one_point_is_enough() {
        let series = |points: Vec<(f64, f64)>| Series {
            name: "Mpps",
            points,
        };
        let svg = lines("size", &[series(vec![(64.0, 8.0), (1500.0, 2.0)])]);
        assert_eq!(svg.matches("<circle").count(), 2);
        assert!(svg.contains("cx=\"60.0\"") && svg.ends_with("</svg>\n"));
        let single = lines("size", &[series(vec![(64.0, 8.0)]), series(vec![])]);
        assert!(!single.contains("NaN") && !single.contains("inf"));
    }
}
