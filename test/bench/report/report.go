// Package report is what a benchmark says: rows of a measured value and its goal, as a table for people and as a JSON
// array for programs. It measures nothing and decides no goal; it only sees to it that every benchmark says it in the
// same form, and that a row says whether its goal holds in words that agree with its numbers.
//
//	rows := []report.Row{report.AtMost("push", map[string]any{"clients": 1}, 0.93, "x docker-registry", 1.0,
//		map[string]any{"kraken_s": 1.86, "docker_registry_s": 2.0})}
//	err := errors.Join(report.Table(os.Stdout, rows), report.WriteFile("test/bench/out/x.json", rows))
package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// Row is one measured thing.
type Row struct {
	Row    string         `json:"row"`    // what was measured; rows are chosen by it
	Params map[string]any `json:"params"` // under which conditions: numbers of clients, sizes, link speeds
	Value  float64        `json:"value"`  // a median, in Unit
	Unit   string         `json:"unit"`
	Goal   string         `json:"goal"`   // a bound on Value, as "<= 1.5"; empty where there is none
	Holds  bool           `json:"holds"`  // Value keeps the goal; true where there is none
	Beside map[string]any `json:"beside"` // what Value was made of, and what else was seen
}

// AtMost is a row whose value must not be above limit.
func AtMost(row string, params map[string]any, value float64, unit string, limit float64, beside map[string]any) Row {
	return Row{row, params, value, unit, "<= " + number(limit), value <= limit, beside}
}

// Below is a row whose value must be under limit.
func Below(row string, params map[string]any, value float64, unit string, limit float64, beside map[string]any) Row {
	return Row{row, params, value, unit, "< " + number(limit), value < limit, beside}
}

// AtLeast is a row whose value must not be under limit.
func AtLeast(row string, params map[string]any, value float64, unit string, limit float64, beside map[string]any) Row {
	return Row{row, params, value, unit, ">= " + number(limit), value >= limit, beside}
}

// Plain is a row without a goal.
func Plain(row string, params map[string]any, value float64, unit string, beside map[string]any) Row {
	return Row{Row: row, Params: params, Value: value, Unit: unit, Holds: true, Beside: beside}
}

// Median is the middle of vs, the mean of both middles of an even number, 0 of none. vs stays as it is.
func Median(vs []float64) float64 {
	if len(vs) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(vs))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// Missed are the rows whose goal does not hold.
func Missed(rows []Row) []Row {
	return slices.DeleteFunc(slices.Clone(rows), func(r Row) bool { return r.Holds })
}

// Table writes the rows in aligned columns.
func Table(w io.Writer, rows []Row) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ROW\tPARAMS\tVALUE\tUNIT\tGOAL\tHOLDS\tBESIDE")
	for _, r := range rows {
		goal, holds := r.Goal, "yes"
		switch {
		case goal == "":
			goal, holds = "-", "-"
		case !r.Holds:
			holds = "NO"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Row, pairs(r.Params), number(r.Value), r.Unit, goal, holds, pairs(r.Beside))
	}
	return t.Flush()
}

// pairs is k=v in the order of keys.
func pairs(m map[string]any) string {
	if len(m) == 0 {
		return "-"
	}
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		v := m[k]
		if f, ok := v.(float64); ok {
			v = number(f)
		}
		out = append(out, fmt.Sprintf("%s=%v", k, v))
	}
	return strings.Join(out, " ")
}

// number keeps at least three digits that mean something and no tail of zeros.
func number(f float64) string {
	decimals := 3
	if f >= 100 || f <= -100 {
		decimals = 1
	}
	s := strconv.FormatFloat(f, 'f', decimals, 64)
	return strings.TrimSuffix(strings.TrimRight(s, "0"), ".")
}

// ReadFile reads what WriteFile wrote.
func ReadFile(path string) (rows []Row, err error) {
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &rows)
	}
	if err != nil {
		return nil, fmt.Errorf("report: %w", err)
	}
	return rows, nil
}

// WriteFile replaces the file at path by a JSON array of the rows; its folder is made.
func WriteFile(path string, rows []Row) error {
	out := make([]Row, 0, len(rows)) // [] when there is none, and {} for absent maps: readers need no special case
	for _, r := range rows {
		if r.Params == nil {
			r.Params = map[string]any{}
		}
		if r.Beside == nil {
			r.Beside = map[string]any{}
		}
		out = append(out, r)
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o644); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(fmt.Errorf("report: %w", err), os.Remove(tmp))
	}
	return nil
}
