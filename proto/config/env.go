package config

import (
	"fmt"
	"os"
	"regexp"
	"strings"
)

// variable is ${NAME}, its escape $${, or a ${ that is neither.
var variable = regexp.MustCompile(`\$\$\{|\$\{[A-Za-z_][A-Za-z0-9_]*\}|\$\{`)

// expand puts environment variables into a value: ${NAME} is the variable's content, $${ stands for ${ itself. It works
// on values that were parsed already, so whatever a variable holds stays within its value. The error names every
// variable that is not set.
func expand(value string) (string, error) {
	if !strings.Contains(value, "${") {
		return value, nil
	}
	var unset []string
	malformed := false
	out := variable.ReplaceAllStringFunc(value, func(v string) string {
		switch v {
		case "$${":
			return "${"
		case "${":
			malformed = true
			return v
		}
		name := v[2 : len(v)-1]
		content, ok := os.LookupEnv(name)
		if !ok {
			unset = append(unset, v)
		}
		return content
	})
	switch {
	case malformed:
		return "", fmt.Errorf("%q: ${ begins a variable, like ${NAME}: write $${ for the characters themselves", value)
	case len(unset) > 0:
		return "", fmt.Errorf("%s is not set in the environment: set it, or write $${ for the characters ${", strings.Join(unset, ", "))
	}
	return out, nil
}
