//! Reads a tide table of one port and answers when a boat can pass its sill.
//!
//! Between two turns of the tide the height is taken to follow half a cosine,
//! as the sailors' rule of twelfths does with coarser steps.

use std::f64::consts::PI;
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Turn {
    pub minute: i32,
    pub metres: f64,
}

#[derive(Debug, PartialEq)]
pub enum TableError {
    BadLine { line: usize, text: String },
    OutOfOrder { line: usize },
    TooShort,
}

impl fmt::Display for TableError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TableError::BadLine { line, text } => {
                write!(f, "line {line}: expected \"HH:MM metres\", found {text:?}")
            }
            TableError::OutOfOrder { line } => write!(f, "line {line}: earlier than the line before"),
            TableError::TooShort => write!(f, "a table needs at least two turns of the tide"),
        }
    }
}

impl std::error::Error for TableError {}

pub struct Table {
    turns: Vec<Turn>,
}

impl Table {
    pub fn parse(text: &str) -> Result<Self, TableError> {
        let mut turns: Vec<Turn> = Vec::new();
        for (index, raw) in text.lines().enumerate() {
            let line = index + 1;
            let content = raw.split('#').next().unwrap_or("").trim();
            if content.is_empty() {
                continue;
            }
            let turn = parse_turn(content).ok_or_else(|| TableError::BadLine {
                line,
                text: content.to_string(),
            })?;
            if turns.last().is_some_and(|last| last.minute >= turn.minute) {
                return Err(TableError::OutOfOrder { line });
            }
            turns.push(turn);
        }
        if turns.len() < 2 {
            return Err(TableError::TooShort);
        }
        Ok(Table { turns })
    }

    /// Height above chart datum, `None` before the first turn and after the last one.
    pub fn height(&self, minute: i32) -> Option<f64> {
        self.turns.windows(2).find_map(|pair| {
            let (from, to) = (pair[0], pair[1]);
            if !(from.minute..=to.minute).contains(&minute) {
                return None;
            }
            let share = f64::from(minute - from.minute) / f64::from(to.minute - from.minute);
            let eased = (1.0 - (PI * share).cos()) / 2.0;
            Some(from.metres + (to.metres - from.metres) * eased)
        })
    }

    /// The minutes, in steps of five, at which there is at least that much water.
    pub fn passable(&self, needed: f64) -> impl Iterator<Item = i32> + '_ {
        let first = self.turns[0].minute;
        let last = self.turns[self.turns.len() - 1].minute;
        (first..=last)
            .step_by(5)
            .filter(move |&minute| self.height(minute).is_some_and(|h| h >= needed))
    }
}

fn parse_turn(content: &str) -> Option<Turn> {
    let (time, metres) = content.split_once(char::is_whitespace)?;
    let (hours, minutes) = time.split_once(':')?;
    let (hours, minutes): (i32, i32) = (hours.parse().ok()?, minutes.parse().ok()?);
    if !(0..24).contains(&hours) || !(0..60).contains(&minutes) {
        return None;
    }
    let metres = metres.trim().parse().ok()?;
    Some(Turn { minute: hours * 60 + minutes, metres })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_way_between_turns_is_half_the_range() {
        let table = Table::parse("03:00 1.0\n09:00 5.0 # springs").unwrap();
        assert!((table.height(6 * 60).unwrap() - 3.0).abs() < 1e-12);
    }

    #[test]
    fn a_line_without_a_height_is_named() {
        let error = Table::parse("03:00 1.0\n\n09:00").err().unwrap();
        assert_eq!(error.to_string(), "line 3: expected \"HH:MM metres\", found \"09:00\"");
    }
}
