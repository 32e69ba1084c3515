package config

import (
	"encoding"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// decoder fills a configuration from a parsed file and collects what is wrong, rather than to stop at the first
// mistake.
type decoder struct {
	mistakes Mistakes
	lines    map[string]int // of each key, by its path
	anchors  map[string]ast.Node
}

// field is where a key of a struct goes.
type field struct {
	index    []int
	positive bool // config:"positive": who writes the key means more than 0
}

// fields are the keys of a struct, inlined ones included.
func fields(t reflect.Type) map[string]field {
	out := map[string]field{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, opts, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		switch {
		case strings.Contains(opts, "inline"):
			for k, inner := range fields(f.Type) {
				inner.index = append([]int{i}, inner.index...)
				out[k] = inner
			}
		case f.IsExported() && name != "" && name != "-":
			out[name] = field{index: []int{i}, positive: f.Tag.Get("config") == "positive"}
		}
	}
	return out
}

// value decodes n into v. key is the path of n.
func (d *decoder) value(key string, n ast.Node, v reflect.Value) {
	switch x := n.(type) {
	case nil, *ast.NullNode:
		return
	case *ast.AnchorNode:
		d.value(key, x.Value, v)
		d.anchors[x.Name.GetToken().Value] = x.Value // not before: it must not hold itself
		return
	case *ast.AliasNode:
		name := x.Value.GetToken().Value
		if d.anchors[name] == nil {
			d.mistakes.Add(key, "*%s: there is no &%[1]s before it", name)
			return
		}
		d.value(key, d.anchors[name], v)
		return
	case *ast.TagNode:
		d.value(key, x.Value, v)
		return
	}
	if v.Kind() == reflect.Pointer {
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	_, isText := v.Addr().Interface().(encoding.TextUnmarshaler)
	switch {
	case isText:
		d.scalar(key, n, v)
	case v.Kind() == reflect.Struct:
		d.mapping(key, n, v)
	case v.Kind() == reflect.Slice:
		d.list(key, n, v)
	default:
		d.scalar(key, n, v)
	}
}

func (d *decoder) mapping(key string, n ast.Node, v reflect.Value) {
	var pairs []*ast.MappingValueNode
	switch x := n.(type) {
	case *ast.MappingNode:
		pairs = x.Values
	case *ast.MappingValueNode:
		pairs = []*ast.MappingValueNode{x}
	default:
		d.mistakes.Add(key, "%s: want keys with values", describe(n))
		return
	}
	known := fields(v.Type())
	for _, p := range pairs {
		if _, ok := p.Key.(*ast.MergeKeyNode); ok {
			d.value(key, p.Value, v)
			continue
		}
		name := p.Key.GetToken().Value
		path := strings.TrimPrefix(key+"."+name, ".")
		d.lines[path] = p.Key.GetToken().Position.Line
		f, ok := known[name]
		if !ok {
			d.mistakes.Add(path, "unknown key: want one of %s", strings.Join(sorted(known), ", "))
			continue
		}
		before, target := len(d.mistakes), v.FieldByIndex(f.index)
		d.value(path, p.Value, target)
		if _, null := p.Value.(*ast.NullNode); f.positive && !null && len(d.mistakes) == before && target.IsZero() {
			d.mistakes.Add(path, "is 0: want more, or leave the key out for the default")
		}
	}
}

func sorted(known map[string]field) []string {
	var names []string
	for k := range known {
		names = append(names, k)
	}
	slices.Sort(names)
	return names
}

func (d *decoder) list(key string, n ast.Node, v reflect.Value) {
	s, ok := n.(*ast.SequenceNode)
	if !ok {
		d.mistakes.Add(key, "%s: want a list", describe(n))
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(s.Values), len(s.Values)))
	for i, item := range s.Values {
		path := fmt.Sprintf("%s[%d]", key, i)
		if item != nil {
			d.lines[path] = item.GetToken().Position.Line
		}
		d.value(path, item, v.Index(i))
	}
}

// scalar decodes a text, number or truth value, with the environment's variables put in.
func (d *decoder) scalar(key string, n ast.Node, v reflect.Value) {
	var text string
	switch x := n.(type) {
	case *ast.StringNode:
		text = x.Value
	case *ast.LiteralNode:
		text = x.Value.Value
	case *ast.MappingNode, *ast.MappingValueNode, *ast.SequenceNode:
		d.mistakes.Add(key, "%s: want a single value", describe(n))
		return
	default:
		text = n.GetToken().Value
	}
	var err error
	if v.Type() != reflect.TypeFor[Literal]() {
		text, err = expand(text)
	}
	if err == nil {
		err = set(v, text)
	}
	if err != nil {
		d.mistakes.Add(key, "%w", err)
	}
}

// set parses text into v.
func set(v reflect.Value, text string) error {
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(text)
	case reflect.Bool:
		switch strings.ToLower(text) {
		case "true", "false":
			v.SetBool(strings.ToLower(text) == "true")
		default:
			return fmt.Errorf("%q: want true or false", text)
		}
	case reflect.Int, reflect.Int64:
		i, err := strconv.ParseInt(text, 0, v.Type().Bits())
		if err != nil || i < 0 {
			return fmt.Errorf("%q: want a whole number, 0 or more", text)
		}
		v.SetInt(i)
	case reflect.Float64:
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || !(f >= 0) { // so written, NaN is refused
			return fmt.Errorf("%q: want a number, 0 or more", text)
		}
		v.SetFloat(f)
	default:
		return fmt.Errorf("%q: no configuration can hold a %s", text, v.Type())
	}
	return nil
}

// describe names a node in a message.
func describe(n ast.Node) string {
	switch n.(type) {
	case *ast.MappingNode, *ast.MappingValueNode:
		return "keys with values"
	case *ast.SequenceNode:
		return "a list"
	}
	return strconv.Quote(n.GetToken().Value)
}
