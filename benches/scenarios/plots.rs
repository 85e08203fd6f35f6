//! Plots of what scripts have measured, drawn as `pollux bench` draws its own.

use std::path::Path;

use pollux::bench::plot::{self, Line, Panel, Scale};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Figure {
    abscissa: String,
    logarithmic: bool,
    panels: Vec<FigurePanel>,
}

#[derive(Deserialize)]
struct FigurePanel {
    name: String,
    lines: Vec<FigureLine>,
}

#[derive(Deserialize)]
struct FigureLine {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Draws the figure on standard input into a file.
pub(crate) fn draw(file: &Path) -> Value {
    let figure: Figure = serde_json::from_reader(std::io::stdin()).unwrap();
    fn line(line: &FigureLine) -> Line<'_> {
        Line {
            name: &line.name,
            points: line.points.clone(),
        }
    }
    let panels: Vec<Panel<'_>> = figure
        .panels
        .iter()
        .map(|panel| Panel {
            name: &panel.name,
            lines: panel.lines.iter().map(line).collect(),
        })
        .collect();
    let scale = if figure.logarithmic {
        Scale::Logarithmic
    } else {
        Scale::Linear
    };
    std::fs::write(file, plot::draw(&figure.abscissa, scale, &panels)).unwrap();
    json!({"panels": panels.len()})
}
