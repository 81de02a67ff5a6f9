"""Chat templates as models have them, and as an attacker would write them."""

# ruff: noqa: E501  a template is one line

TEMPLATES = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- set ns = namespace(found=false, text='') -%}{%- for m in messages -%}{%- if loop.first and "
    "m.role == 'system' -%}{%- set ns.found = true -%}{%- endif -%}{%- set ns.text = ns.text ~ m.content "
    "-%}{%- endfor -%}{{ ns.text }}{{ ns.found }}",
    "{% macro show(v, n) %}{% if n > 0 %}[{{ show(v, n - 1) }}]{% else %}{{ v | tojson }}{% endif %}"
    "{% endmacro %}{{ show(messages, 3) }}{{ '%s-%5d' % ('a', 3) }}{{ 'x' * 3 }}{{ [1, 2] + [3] }}",
    "{% for m in messages if m.role != 'tool' %}{{ m.content.split('a') | join('b') | replace('c', 'dd') "
    "| upper | indent(2) }}{{ range(3) | list }}{{ m.content[::2] ~ loop.index }}{% endfor %}"
    "{{ '{:>5}'.format(3) }}{{ raise_exception('no') if messages | length > 9 }}",
    "{% set rows = [] %}{% for i in range(3) %}{% set rows = rows + [i, i ** 2] %}{% endfor %}{{ rows }}"
    "{{ dict(a=1).items() | list }}{{ messages | map(attribute='role') | unique | sort | batch(2) | list }}",
)
LOOPS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j > i and i > j %}{{ j }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n > 0 }}{% endmacro %}{{ f(40) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ 'a' * 9999999999 }}",
    "{{ ['a'] * 9999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 2 ** 2 ** 2 ** 2 ** 2 ** 2 }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('a', ns.s) "
    "%}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', ns.s) "
    "%}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s.join([ns.s, ns.s, ns.s]) "
    "%}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] | join(ns.s) "
    "%}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=(1,)) %}{% for i in range(60) %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}"
    "{{ {ns.l: 1} }}",
    "{% set a = namespace(l=[1]) %}{% set b = namespace(l=[1]) %}{% for i in range(60) %}{% set a.l = "
    "[a.l, a.l] %}{% set b.l = [b.l, b.l] %}{% endfor %}{{ a.l == b.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}"
    "{{ ns.l | tojson }}",
    "{% set a = namespace(x=1) %}{% for i in range(60) %}{% set b = namespace(x=[a, a]) %}{% set a.y = b %}"
    "{% endfor %}{{ a }}",
    "{{ 'a' | center(9999999999) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ ('\\t' * 9999).expandtabs(99999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w='9999999999') }}",
    "{{ '{0:{1}}'.format('a', 999999999) }}",
    "{{ 'a'.zfill(9999999999) }}",
    "{{ [1] | batch(9999999999, 'x') | list }}",
    "{{ [1] | slice(999999999) | list }}",
    "{{ ('a\\n' * 9999) | indent(9999999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ lipsum(n=999999) }}",
    "{{ ('<!--' * 999999) | striptags }}",
    "{{ ('www.' * 999999) | urlize }}",
    "{{ ('a ' * 999999) | wordwrap(3) }}",
    "{{ range(99999) | list | map('string') | map('center', 9999) | join }}",
    "{{ ([[1]] * 99999) | sum(start=[]) }}",
    "{{ 1.5 | round(999999999) }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ self.__init__.__globals__ }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}{{ os.system('x') }}",
    "{% extends 'x' %}",
    "{{ messages.append(1) }}",
    "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 999 }}{% endfor %}",
    "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [i] %}{% endfor %}",
    "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for c in [[]] recursive %}{{ loop([[], []]) if loop.depth < 60 }}{% endfor %}",
    "{{ 'a'.translate({97: 'b' * 99999}) }}",
    "(" * 100 + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% if true %}" * 150 + "{% endif %}" * 150,
    "{{ " + "-" * 5000 + "1 }}",
    "{{ 'a'" + " ~ 'a'" * 5000 + " }}",
    "{% set ns = namespace(d='x') %}{% for i in range(99999) %}{% set ns.d = ns.d ~ ('y' * 9999) %}{% endfor %}",
    "{% filter indent(99999) %}{% for i in range(9999) %}a\n{% endfor %}{% endfilter %}",
    "{% set x %}{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}{% endset %}{{ x }}",
    "{% call(x) range(99999999) %}{% endcall %}",
    "{{ joiner(['a'] * 99999)() }}{{ namespace }}{{ dict.fromkeys(range(99999), 'a' * 9999) }}",
    "{{ (range(99999) | list | string) * 99 }}",
    "{{ messages | map('tojson') | map('replace', '', 'a' * 9999) | map('replace', '', 'b' * 9999) | join }}",
    "{{ ('a' * 99999).count('') }}{{ ('a' * 99999).split('a') * 999 }}",
    "{% for i in range(9999) %}{{ 'ab' * 9999 in ('aab' * 9999) }}{% endfor %}",
    "{{ 'x'.encode('utf-32') * 999999999 }}",
    "{{ -9 ** 99999999 }}{{ 9.9 ** 9999 }}{{ 1 // 0 }}{{ 1 % 0 }}",
    "{{ strftime_now('%Y' * 99999) }}{{ strftime_now('%9999999999Y') }}",
)
