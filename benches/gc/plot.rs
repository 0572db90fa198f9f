//! Throughput over time, a panel for each scheme and load, a line for each utilisation.

use std::path::Path;

use plotters::prelude::*;

use super::Outcome;

const COLOURS: [RGBColor; 4] =
    [RGBColor(31, 119, 180), RGBColor(44, 160, 44), RGBColor(255, 127, 14), RGBColor(214, 39, 40)];

/// Writes an SVG of all outcomes.
pub(super) fn draw(path: &Path, outcomes: &[Outcome]) {
    let root = SVGBackend::new(path, (1200, 800)).into_drawing_area();
    root.fill(&WHITE).expect("drawn");
    let mut groups: Vec<(String, Vec<&Outcome>)> = Vec::new();
    for outcome in outcomes {
        let name = outcome.case.load();
        match groups.iter_mut().find(|(known, _)| *known == name) {
            Some((_, members)) => members.push(outcome),
            None => groups.push((name, vec![outcome])),
        }
    }
    let panels = root.split_evenly((groups.len().div_ceil(2), 2));
    for (panel, (name, members)) in panels.iter().zip(&groups) {
        let seconds = members.iter().map(|o| o.seconds.len()).max().unwrap_or(1) as f64;
        let most = members.iter().flat_map(|o| &o.seconds).max().copied().unwrap_or(1) as f64;
        let mut chart = ChartBuilder::on(panel)
            .caption(format!("{name}: writes of 4 KiB per second"), ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..seconds, 0.0..most * 1.05)
            .expect("a chart");
        chart.configure_mesh().x_desc("seconds").light_line_style(WHITE).draw().expect("drawn");
        for (colour, outcome) in COLOURS.iter().cycle().zip(members) {
            // The last second is not whole.
            let whole = outcome.seconds.len().saturating_sub(1);
            let points = outcome.seconds[..whole].iter().enumerate();
            let line = points.map(|(second, writes)| (second as f64 + 0.5, *writes as f64));
            chart
                .draw_series(LineSeries::new(line, colour.stroke_width(2)))
                .expect("drawn")
                .label(format!("{} % full", outcome.case.utilisation))
                .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], *colour));
        }
        chart
            .configure_series_labels()
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()
            .expect("drawn");
    }
    root.present().expect("a writable file");
}
